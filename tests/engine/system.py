"""A whole prism_sgl as a test sees it: started from its command line, looked at from outside.

Memory is read from the kernel, not from our own books: ``st_blocks`` of the memfds that the engine processes
hold, found through /proc.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from prism_sgl.allocator.ledger import Ledger

READY_TIMEOUT_S = 240
SHM_FOLDER = Path("/dev/shm")


class System:
    """The launcher process and its address. ``lines`` is all that it printed so far.

    ``program``: arguments of Python; a test may start the launcher with another standby.
    """

    def __init__(
        self,
        config: Path,
        run_dir: Path,
        log_dir: Path,
        port: int,
        program: Sequence[str] = ("-m", "prism_sgl.launch"),
    ) -> None:
        self.run_dir = run_dir
        self.log_dir = log_dir
        self.url = f"http://127.0.0.1:{port}"
        self._ledgers = f"prism_sgl-{os.getuid()}-{port}-*"
        self._listed: set[Path] = set()
        self.client = httpx.Client(base_url=self.url, timeout=180)
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-u", *program, "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch_listings, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(line)
        self._queue.put(None)

    def _watch_listings(self) -> None:
        """A runtime's list of its files in /dev/shm goes with the runtime, so it is read while that lives."""
        while self.process.poll() is None:
            for listing in self.run_dir.glob("*.shm"):
                with suppress(FileNotFoundError):
                    self._listed.update(Path(line) for line in listing.read_text().splitlines())
            time.sleep(0.1)

    def shared_files(self) -> set[Path]:
        """What this system has in /dev/shm; other systems may run beside it."""
        return {file for file in self._listed if file.exists()} | set(SHM_FOLDER.glob(self._ledgers))

    def ledger(self, device: str) -> Ledger:
        return Ledger.open(str(next(SHM_FOLDER.glob(f"{self._ledgers}{device}.ledger"))))

    def wait_ready(self) -> None:
        """Until the launcher says that all models are ready."""
        self.wait_line("curl ")

    def wait_line(self, part: str) -> str:
        """The next line with ``part`` that the launcher prints."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            line = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, "the launcher ended:\n" + "\n".join(self.lines)
            if part in line:
                return line

    def stop(self) -> int:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    # -- asking

    def generate(self, model: str, ids: list[int], num_tokens: int, **extra: Any) -> dict[str, Any]:
        body = {
            "input_ids": ids,
            "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
            **extra,
        }
        reply = self.client.post(f"/m/{model}/generate", json=body)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def status(self, model: str) -> dict[str, Any]:
        models = self.client.get("/v1/models").json()["data"]
        found: dict[str, Any] = next(m for m in models if m["id"] == model)["prism"]
        return found

    def admin(self, verb: str, model: str) -> httpx.Response:
        return self.client.post(f"/api/v1/models/{model}/{verb}")

    def log_text(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.log_dir.glob("*")))

    # -- looking from outside

    def processes(self) -> dict[int, str]:
        """Every living process below the launcher: pid and command line."""
        return {pid: _command_line(pid) for pid in _descendants(self.process.pid)}

    def running_module(self, module: str) -> int | None:
        """pid of a process of ``python -m prism_sgl.<module>``; of several the first."""
        part = f"prism_sgl.{module}"
        return next((pid for pid, line in self.processes().items() if part in line), None)

    def arenas(self) -> dict[str, int]:
        """Physical bytes of each arena, by "<runtime>:<kv|weights>", each memfd counted once."""
        found: dict[int, tuple[str, int]] = {}
        for pid in _descendants(self.process.pid):
            for link, status in _open_files(pid):
                name = link.removeprefix("/memfd:").removesuffix(" (deleted)")
                if name.startswith("prism:"):
                    found[status.st_ino] = (name.removeprefix("prism:"), status.st_blocks * 512)
        return dict(found.values())

    def held(self, model: str, kind: str) -> int:
        """Physical bytes of the arenas of one kind ("kv", "weights") of one model."""
        return sum(
            size
            for name, size in self.arenas().items()
            if name.startswith(f"{model}@") and name.endswith(kind)
        )

    def runtime_pids(self, model: str) -> dict[str, int]:
        """pids of the model's processes that hold an arena: its scheduler, under "scheduler"; its worker."""
        pids: dict[str, int] = {}
        for pid in _descendants(self.process.pid):
            if any(f"prism:{model}@" in link for link, _ in _open_files(pid)):
                pids["scheduler"] = pid
                pids["worker"] = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        return pids


@contextmanager
def running(folder: Path, config: str, **fields: object) -> Iterator[System]:
    """A system of its own in ``folder``, all models ready; at its end nothing may be left of it.

    ``config``: with {port}, {run_dir} and {log_dir} to be filled in, and whatever else ``fields`` has.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file, run_dir, log_dir = folder / "models.toml", folder / "run", folder / "logs"
    file.write_text(config.format(port=port, run_dir=run_dir, log_dir=log_dir, **fields))
    system = System(file, run_dir, log_dir, port)
    try:
        system.wait_ready()
        yield system
    finally:
        processes = system.processes()
        code = system.stop()
    assert code == 0, "\n".join(system.lines)
    # No orphan and no file is left behind, whatever the tests have killed.
    assert not [line for pid, line in processes.items() if Path(f"/proc/{pid}").exists()]
    assert not system.shared_files()
    assert not run_dir.exists()


def wait_for(what: str, true: Any, timeout_s: float = 60, every_s: float = 0.005) -> None:
    """Until a thing outside us is so; looks every few milliseconds, or less often where looking costs more."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    pending = [root]
    while pending:
        children = parents.get(pending.pop(), [])
        found += children
        pending += children
    return found


def _open_files(pid: int) -> Iterator[tuple[str, os.stat_result]]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError):
        return
    for name in names:
        try:
            link = os.readlink(f"{folder}/{name}")
            if link.startswith("/memfd:"):
                yield link, os.stat(f"{folder}/{name}")
        except (FileNotFoundError, ProcessLookupError):
            continue


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
