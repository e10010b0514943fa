"""Router, api_server and fake engines as real processes; the test plays the supervisor."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import zmq

from prism_sgl import addresses
from prism_sgl.config import load, save
from prism_sgl.messages import (
    RuntimeExited,
    RuntimeId,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    SupervisorToRouter,
    decode_router_to_supervisor,
    encode,
)

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0


class Program:
    """A child process whose lines can be waited for."""

    def __init__(self, module: str, arguments: Sequence[str], fds: Sequence[int] = ()) -> None:
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            pass_fds=tuple(fds),
            cwd=ROOT,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def line(self, part: str) -> str:
        """The next line that has ``part``."""
        while (line := self._queue.get(timeout=WAIT_S)) is not None:
            if part in line:
                return line
        raise AssertionError(f"ended without {part!r}:\n" + "\n".join(self.lines))

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)


class Stack:
    def __init__(
        self,
        models: Sequence[str],
        *,
        server: str = "",
        extra: str = "",
        hold_wakes: bool = False,
        num_devices: int = 1,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="px-", dir="/tmp"))  # short: names of sockets are limited
        self.run_dir = str(self.folder)
        self._hold_wakes = hold_wakes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = self._write_config(models, server, extra, num_devices)
        self.engines: dict[str, Program] = {}  # by model: the newest
        self.programs: dict[RuntimeId, Program] = {}  # all that ever were
        self._alive: set[RuntimeId] = set()
        self._ids: dict[str, RuntimeId] = {}
        self._started: queue.Queue[str] = queue.Queue()
        self._arguments = ["--config", self._save_config(), "--run-dir", self.run_dir]
        self.client = httpx.Client(base_url=self.url, timeout=WAIT_S)
        self.router = self.start_router()
        self.api = self.start_api()
        self._context = zmq.Context()
        self._commands = self._connect_supervisor()
        self._stopping = threading.Event()
        self.supervisor_speaks = threading.Event()  # cleared: it hears and says nothing
        self.supervisor_speaks.set()
        self._outbox: queue.Queue[SupervisorToRouter] = queue.Queue()
        self._outbox.put(SupervisorHello())
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _write_config(self, models: Sequence[str], server: str, extra: str, num_devices: int) -> Path:
        model = self.folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({}))
        file = self.folder / "models.toml"
        file.write_text(
            f'[server]\nport = {self.port}\nrun_dir = "{self.run_dir}"\ndrain_timeout = "5s"\n{server}\n'
            + "".join(
                f'[[devices]]\nname = "host{i}"\nkind = "host"\nmemory = "256MiB"\n'
                for i in range(num_devices)
            )
            + "".join(f'[models.{name}]\npath = "{model}"\n' for name in models)
            + extra.replace("MODEL", str(model))
        )
        return file

    def _save_config(self) -> str:
        """As the supervisor hands it to router and api_server."""
        file = self.folder / "config.json"
        save(load(self.config), file)
        return str(file)

    def start_router(self) -> Program:
        self.router = Program("prism_sgl.launch.router", self._arguments)
        return self.router

    def start_api(self, ledgers: str = "") -> Program:
        fd = self._listener.fileno()
        more = ["--fd", str(fd), *(["--ledgers", ledgers] if ledgers else [])]
        self.api = Program("prism_sgl.launch.api_server", [*self._arguments, *more], fds=[fd])
        return self.api

    # ------------------------------------------------------------ as a supervisor

    def _connect_supervisor(self) -> zmq.Socket[bytes]:
        commands = self._context.socket(zmq.DEALER)
        commands.setsockopt(zmq.IDENTITY, b"supervisor")
        commands.setsockopt(zmq.LINGER, 0)
        commands.setsockopt(zmq.RECONNECT_IVL, 20)
        commands.connect(addresses.router_for_supervisor(self.run_dir))
        return commands

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            if not self.supervisor_speaks.wait(0.02):
                continue
            while not self._outbox.empty():
                self._commands.send(encode(self._outbox.get()))
            if not self._commands.poll(20):
                continue
            match decode_router_to_supervisor(self._commands.recv()):
                case StartRuntime(runtime=runtime, model=model):
                    arguments = ["--runtime", runtime, "--run-dir", self.run_dir]
                    more = ["--hold-wakes"] if self._hold_wakes else []
                    self._ids[model] = runtime
                    self.engines[model] = Program("tests.fake_engine", [*arguments, *more])
                    self.programs[runtime] = self.engines[model]
                    self._alive.add(runtime)
                    self._started.put(model)
                case StopRuntime(runtime=runtime):
                    if runtime in self._alive:
                        self.programs[runtime].kill()
                        self._report_exit(runtime, expected=True)
                case _:
                    self._outbox.put(SupervisorHello(alive=list(self._alive)))

    def report_exit(self, model: str, *, expected: bool = False) -> None:
        """Of the newest runtime of this model."""
        self._report_exit(self._ids[model], expected=expected)

    def _report_exit(self, runtime: RuntimeId, *, expected: bool) -> None:
        self._alive.discard(runtime)
        self._outbox.put(RuntimeExited(runtime=runtime, reason="killed by SIGKILL", expected=expected))

    def engine(self, model: str) -> Program:
        """The engine of this model once it has been started and is ready; each start is answered once."""
        while model not in self.engines or self.engines[model].process.poll() is not None:
            self._started.get(timeout=WAIT_S)
        return self.engines[model]

    def kill_engine(self, model: str) -> None:
        self.engines[model].kill()
        self.report_exit(model)

    # ------------------------------------------------------------

    def wait_ready(self) -> None:
        """Each preloaded model has been up: asked of /ready, which knows it from the router."""
        for program in (self.router, self.api):
            program.line("ready")
        wait_for("ready", lambda: self.client.get("/ready").status_code == 200)

    def chat(self, model: str, **fields: object) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def state(self, model: str) -> str:
        return str(self.client.get(f"/api/v1/models/{model}").json()["state"])

    def metric(self, line: str) -> float:
        """The value of the metric whose name and labels these are."""
        for text in self.client.get("/metrics").text.splitlines():
            if text.startswith(line + " "):
                return float(text.rsplit(" ", 1)[1])
        return 0.0

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(WAIT_S)
        for program in (*self.programs.values(), self.api, self.router):
            if program.process.poll() is None:
                program.kill()
        self._commands.close()
        self._context.term()
        self.client.close()
        self._listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for(what: str, true: object) -> None:
    """Until a thing in another process is so; looks every few milliseconds."""
    import time

    assert callable(true)
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_S} s"
        time.sleep(0.005)


@contextmanager
def running(models: Sequence[str] = ("chat", "code"), **options: object) -> Iterator[Stack]:
    stack = Stack(models, **options)  # type: ignore[arg-type]
    try:
        stack.wait_ready()
        yield stack
    finally:
        stack.close()
