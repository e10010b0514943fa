"""A real supervisor process with small programs in place of router, api_server and standby."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prism_sgl.launch.processes import read_stat

_RUN = """
import sys
from prism_sgl.config import load
from prism_sgl.errors import PrismError
from prism_sgl.launch.supervisor import Programs, run
tiny = "tests.launch.programs.tiny_"
try:
    programs = Programs(tiny + "router", tiny + "api_server", tiny + "standby")
    sys.exit(run(load(sys.argv[1]), programs=programs))
except PrismError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def write_config(folder: Path, port: int, models: str = "", server: str = "") -> Path:
    """A models.toml with one device and the model ``chat``, whose files tell nothing."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({}))
    file = folder / "models.toml"
    file.write_text(
        f'[server]\nport = {port}\nrun_dir = "{folder}/run"\ndrain_timeout = "5s"\n{server}\n'
        '[[devices]]\nname = "host0"\nkind = "host"\nmemory = "64MiB"\n'
        + (models or f'[models.chat]\npath = "{model}"\n').replace("MODEL", str(model))
    )
    return file


@dataclass
class Instance:
    folder: Path
    port: int
    config: Path
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @classmethod
    def start(
        cls, folder: Path, port: int, models: str = "", *, server: str = "", wrapper: Sequence[str] = ()
    ) -> Instance:
        """``wrapper``: a command that starts the one behind it, e.g. nohup."""
        config = write_config(folder, port, models, server)
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", _RUN, str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        return cls(folder, port, config, process)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def ledger(self) -> Path:
        return Path(f"/dev/shm/prism_sgl-{os.getuid()}-{self.port}-host0.ledger")

    def line(self, part: str) -> str:
        """The next line that has ``part``; blocks until the supervisor prints it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if part in line:
                return self.lines[-1]
        raise AssertionError(f"ended without {part!r}:\n" + "\n".join(self.lines))

    def pids(self) -> dict[str, int]:
        """Leaders of all sessions, by name, as the supervisor records them."""
        fields = (line.split(" ", 2) for line in (self.run_dir / "pids").read_text().splitlines())
        return {name: int(pid) for pid, _, name in fields}

    def ask(self) -> list[str]:
        """One connection to the tiny api_server: its pid, TMPDIR and ledgers."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            return connection.makefile().read().split()

    def router_log(self) -> str:
        return (self.run_dir / "logs" / "router.log").read_text()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        assert self.process.stdout is not None
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait()


def is_alive(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.state != "Z"


def wait_for_end(pid: int) -> None:
    """Blocks until the process is gone, without looking again and again."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(30_000), f"{pid} lives on"
    finally:
        os.close(fd)
