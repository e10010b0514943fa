"""What the GPU benchmarks share: a card with ledger and image store, engines in child processes, NVML, a time limit.

Every engine is a child of its own (``engine_process.py``), so ours, plain SGLang and peers live side by side on one
card and start in parallel. A child answers its commands in order: send to several, then receive from each.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.results import ROOT, Results

_LOG_LINES_KEPT = 400
GIB = 1 << 30
MIB = 1 << 20
PAGE_BYTES = 128 << 20
MODELS_DIR = Path(os.environ.get("PRISM_BENCH_MODELS", "/dev/shm/models"))
ENGINE = "benchmarks.gpu.engine_process:EngineHandler"
CARD = "benchmarks.gpu.card_process:CardHandler"
Action = Mapping[str, Any]
KV_BYTES_PER_TOKEN = {"llama8b": 32 * 2 * 8 * 128 * 2, "llama1b": 16 * 2 * 8 * 64 * 2}

# An rpc that changes nothing: what the way to the scheduler and back costs (Scheduler.is_fully_idle).
EMPTY_RPC: Action = {"name": "is_fully_idle"}
SLEEP: Action = {"name": "prism_sleep", "args": {"keep_weights": False}}
SLEEP_KEEPING_WEIGHTS: Action = {"name": "prism_sleep", "args": {"keep_weights": True}}
WAKE: Action = {"name": "prism_wake", "args": {"timeout_s": 30.0, "wait": False}}
WAKE_AND_WAIT: Action = {"name": "prism_wake", "args": {"timeout_s": 30.0, "wait": True}}

# Flags of both sides alike. sleep_on_idle: an idle engine must not take a core from the one that is measured.
COMMON_FLAGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "sampling_backend": "pytorch",  # flashinfer's would compile for minutes
    "grammar_backend": "none",
    "disable_prefill_cuda_graph": True,
    "incremental_streaming_output": True,
    # The first token comes at once all the same; 10,000 chunks a second would keep the child's Python busy.
    "stream_interval": 8,
    "sleep_on_idle": True,
    "skip_server_warmup": True,
    "page_size": 1,
    "random_seed": 1,
    "log_level": "info",
    "mem_fraction_static": 0.95,  # pools are sized by max_total_tokens; this must only not forbid them
}


class ChildError(Exception):
    """A child refused a command, died or did not answer in time; the message holds the end of its log."""


class OutOfTimeError(BaseException):
    """The benchmark's time is over. Not an Exception: no single measurement may swallow it."""


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


_BEGAN = time.monotonic()


# ---------------------------------------------------------------- children


class Child:
    """One child process and the line to it."""

    def __init__(
        self, name: str, handler: str, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log_path = log_path
        ours, theirs = socket.socketpair()
        variables = dict(os.environ) | dict(environment or {})
        variables["PYTHONPATH"] = os.pathsep.join(
            part for part in (str(ROOT), variables.get("PYTHONPATH", "")) if part
        )
        command = [sys.executable, "-m", "benchmarks.gpu.engine_process"]
        command += ["--fd", str(theirs.fileno()), "--handler", handler]
        with log_path.open("ab") as log:  # appended: the scheduler writes to the same file by its name
            self.process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd=ROOT,
            )
        theirs.close()
        self._line = ours
        self._buffer = b""
        self._sent = 0
        self._received = 0

    def send(self, verb: str, **args: Any) -> None:
        """Queue a command; its reply comes with the ``receive`` of the same turn."""
        self._sent += 1
        try:
            self._line.sendall(json.dumps({"id": self._sent, "verb": verb, **args}).encode() + b"\n")
        except OSError as error:
            raise self._error(f"does not take {verb}: {error}") from error

    def receive(self, timeout_s: float = 120.0) -> Any:
        """The reply to the oldest command that has none yet.

        Raises:
            ChildError: it failed, the child has died, or nothing came in time.
        """
        if self._received == self._sent:
            raise ValueError(f"{self.name} was asked nothing")
        reply = json.loads(self._read_line(timeout_s))
        self._received += 1
        assert reply["id"] == self._received, (reply["id"], self._received)
        if "error" in reply:
            raise self._error(reply["error"])
        return reply["result"]

    def call(self, verb: str, timeout_s: float = 120.0, **args: Any) -> Any:
        assert self._received == self._sent, f"{self.name} still owes an answer"
        self.send(verb, **args)
        return self.receive(timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """End it and everything below it, politely if it listens."""
        with contextlib.suppress(ChildError, OSError, ValueError):
            self.send("close")
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _read_line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._line], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._error(f"no answer in {timeout_s:.0f} s")
            try:
                data = self._line.recv(1 << 20)
            except OSError as error:
                raise self._error(str(error)) from error
            if not data:
                raise self._error("has died")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _error(self, reason: str) -> ChildError:
        return ChildError(f"{self.name}: {reason}\n--- end of {self.log_path}\n{self.log_tail()}")


@dataclass
class Burst:
    """The answers of one generate."""

    began: float
    wall_s: float
    answers: list[dict[str, Any]]

    @property
    def errors(self) -> list[str]:
        return [answer["error"] for answer in self.answers if answer["error"]]

    @property
    def ttfts_s(self) -> list[float]:
        return [answer["ttft_s"] for answer in self.answers if answer["ttft_s"] is not None]

    @property
    def tpots_s(self) -> list[float]:
        return [answer["tpot_s"] for answer in self.answers if answer["tpot_s"] is not None]

    @property
    def new_tokens(self) -> int:
        return sum(answer["tokens"] for answer in self.answers)

    @property
    def ids(self) -> list[list[int]]:
        return [answer["ids"] for answer in self.answers]


class Engine(Child):
    """An engine of any kind. Made by ``Card``; ready after ``wait``."""

    def __init__(
        self, kind: str, name: str, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(name, ENGINE, log_path, environment)
        self.kind = kind
        self.pids: list[int] = []
        self.flags: dict[str, str] = {}
        self.is_ready = False
        self._start: dict[str, Any] = {}

    def prepare(self, device_kind: str, start: dict[str, Any]) -> None:
        """Begin SGLang's imports; ``start`` is what ``begin`` will send."""
        self._start = start
        self.send("prepare", kind=self.kind, device_kind=device_kind)

    def begin(self) -> None:
        say(f"{self.name}: starting ({self.kind})")
        self.send("start", kind=self.kind, **self._start)

    def wait(self, timeout_s: float = 240.0) -> None:
        self.receive(timeout_s)  # the imports
        started = self.receive(timeout_s)
        self.pids = started["pids"]
        self.flags = started["flags"]
        self.is_ready = True
        say(f"{self.name}: ready, {started['start_s']:.1f} s after its imports")

    def send_burst(
        self, asks: Sequence[Ask], *, keep_ids: bool = False, one_by_one: bool = False, at: float = 0.0
    ) -> None:
        self.send(
            "generate", asks=[asdict(ask) for ask in asks], keep_ids=keep_ids, one_by_one=one_by_one, at=at
        )

    def receive_burst(self, timeout_s: float = 120.0) -> Burst:
        return Burst(**self.receive(timeout_s))

    def burst(self, asks: Sequence[Ask], timeout_s: float = 120.0, **how: Any) -> Burst:
        self.send_burst(asks, **how)
        return self.receive_burst(timeout_s)

    def act(self, action: Action, times: int = 1, timeout_s: float = 120.0) -> list[float]:
        result: list[float] = self.call("act", timeout_s, action=action, times=times)
        return result

    def act_then_generate(self, action: Action, ask: Ask, timeout_s: float = 120.0) -> dict[str, Any]:
        result: dict[str, Any] = self.call("act_then_generate", timeout_s, action=action, ask=asdict(ask))
        return result

    def log_mark(self) -> int:
        return self.log_path.stat().st_size

    def log_matches(self, pattern: str, since: int = 0, wait_s: float = 0.3) -> list[tuple[str, ...]]:
        """Groups of every match in what was logged after ``since``; waits a little for the first."""
        deadline = time.monotonic() + wait_s
        while True:
            with self.log_path.open("rb") as log:
                log.seek(since)
                text = log.read().decode(errors="replace")
            found = [match.groups() for match in re.finditer(pattern, text)]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)


# ---------------------------------------------------------------- the card


class Card:
    """One card for one benchmark: a private folder, a ledger, an image store, and all children, ended together."""

    def __init__(
        self, budget_bytes: int, *, device_kind: str = "cuda", host_cache_bytes: int = 0, owner: str = "gpu0"
    ) -> None:
        self.budget_bytes = budget_bytes
        self.only_prepare = False  # engines import and wait for ``Engine.begin``
        self.device_kind = device_kind
        self.device = owner
        self.children: list[Child] = []
        self.engines: list[Engine] = []
        self._host_cache_bytes = host_cache_bytes
        self._ports: set[int] = set()

    def __enter__(self) -> Card:
        from prism_sgl.allocator.ledger import Ledger

        # Short: names of Unix sockets have 107 bytes. In memory: the ledger is a mapped file.
        self.run_dir = Path(tempfile.mkdtemp(prefix="pb-", dir="/dev/shm"))
        self.ledger = Ledger.create(str(self.run_dir / "ledger"), self.budget_bytes, self.device)
        self._store = ImageStoreThread(str(self.run_dir), self._host_cache_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):  # out of time: no politeness
            for child in self.children:
                child.kill()
        closers = [threading.Thread(target=child.close) for child in self.children]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        self._store.close()
        self.ledger.close()
        self._keep_logs()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def child(self, name: str) -> Child:
        """A process with the verbs of ``card_process.py``."""
        child = Child(name, CARD, self.run_dir / f"{name}.log")
        self.children.append(child)
        return child

    def ours(self, name: str, model: Path, **flags: Any) -> Engine:
        """One of our runtimes. ``floor_bytes``, ``ceiling_bytes``, ``page_bytes`` are taken out of the flags."""
        floor_bytes = flags.pop("floor_bytes", 0)
        ceiling_bytes = flags.pop("ceiling_bytes", 0)
        page_bytes = flags.pop("page_bytes", PAGE_BYTES)
        spec = {
            "runtime": f"{name}@{self.device}.1",
            "model": name,
            "path": str(model),
            "device": self.device,
            "device_kind": self.device_kind,
            "device_index": 0,
            "ledger_path": self.ledger.path,
            "run_dir": str(self.run_dir),
            "floor_bytes": floor_bytes,
            "ceiling_bytes": ceiling_bytes,
            "priority": 0,
            "block_tokens": flags.get("page_size", 1),
            "kv_page_bytes": page_bytes,
            "weights_page_bytes": page_bytes,
            "engine_args": self._flags(model, flags, ours=True),
            "env": {},
            "log_path": str(self.run_dir / f"{name}.log"),
            "log_level": flags.get("log_level", "info"),
            "weights_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        }
        return self._engine("ours", name, {}, spec=spec)

    def stock(self, name: str, model: Path, **flags: Any) -> Engine:
        """Plain SGLang."""
        return self._engine("stock", name, self._flags(model, flags))

    def memory_saver(self, name: str, model: Path, *, retain: bool, **flags: Any) -> Engine:
        """Plain SGLang with torch_memory_saver and a CPU backup of the weights."""
        flags |= {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
        environment = {"TMS_RETAIN_CPU_BACKUP": "1"} if retain else {}
        return self._engine("tms", name, self._flags(model, flags), environment=environment)

    def kvcached(self, name: str, model: Path, **flags: Any) -> Engine:
        """Plain SGLang with kvcached, if it is importable."""
        environment = kvcached_environment(self.run_dir, name)
        if environment is None:
            raise ChildError("kvcached is not installed")
        return self._engine("kvcached", name, self._flags(model, flags), environment=environment)

    def _engine(
        self,
        kind: str,
        name: str,
        args: dict[str, Any],
        *,
        spec: dict[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Engine:
        engine = Engine(kind, name, self.run_dir / f"{name}.log", environment)
        self.children.append(engine)
        self.engines.append(engine)
        engine.prepare(self.device_kind, {"args": args, "spec": spec})
        if not self.only_prepare:
            engine.begin()
        return engine

    def _flags(self, model: Path, flags: dict[str, Any], *, ours: bool = False) -> dict[str, Any]:
        chosen: dict[str, Any] = COMMON_FLAGS | {
            "context_length": 4096,
            "nccl_port": self._free_port(),  # SGLang's own choice races when engines start together
        }
        if self.device_kind == "cuda":
            chosen["attention_backend"] = attention_backend()
        chosen |= flags
        return chosen if ours else {"model_path": str(model), **chosen}

    def _free_port(self) -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port: int = probe.getsockname()[1]
            if port not in self._ports:
                self._ports.add(port)
                return port

    def _keep_logs(self) -> None:
        """Whole in /tmp; their ends also in ``$OUT``, which comes back from the GPU box."""
        kept = Path(tempfile.gettempdir()) / "prism-bench-logs"
        kept.mkdir(exist_ok=True)
        ends = ""
        for child in self.children:
            shutil.copy(child.log_path, kept / child.log_path.name)
            ends += f"==== {Path(sys.argv[0]).stem}: {child.name}\n{child.log_tail(_LOG_LINES_KEPT)}\n"
        if out := os.environ.get("OUT"):
            with (Path(out) / "logs.txt").open("a") as file:
                file.write(ends)
        say(f"logs of all children: {kept}")


def wait_all(engines: Sequence[Engine], timeout_s: float = 240.0) -> None:
    """All ready, or ChildError of the first that is not."""
    deadline = time.monotonic() + timeout_s
    for engine in engines:
        engine.wait(max(1.0, deadline - time.monotonic()))


def different_flags(one: Engine, other: Engine) -> dict[str, tuple[str | None, str | None]]:
    """SGLang's arguments in which two engines differ: to be shown, so that nobody compares apples with pears."""
    names = sorted(one.flags.keys() | other.flags.keys())
    return {
        name: (one.flags.get(name), other.flags.get(name))
        for name in names
        if one.flags.get(name) != other.flags.get(name) and name != "nccl_port"
    }


class ImageStoreThread:
    """The supervisor's image store, on a loop of its own in a thread of its own."""

    def __init__(self, run_dir: str, cap_bytes: int) -> None:
        from prism_sgl.launch.image_store import ImageStore

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="images", daemon=True)
        self._thread.start()
        self._store = ImageStore(run_dir, cap_bytes, lambda text: say(text), in_use=lambda model: True)
        self._on_loop(self._store.start)

    def close(self) -> None:
        self._on_loop(self._store.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _on_loop(self, action: Callable[[], None]) -> None:
        async def run() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)


class Neighbour:
    """An owner in the ledger that takes memory by right, as a model that wakes does: it asks, waits and holds."""

    def __init__(self, card: Card, name: str = "neighbour") -> None:
        from prism_sgl.allocator.doorbell import Doorbell
        from prism_sgl.allocator.ledger import Kind, Ledger
        from prism_sgl.messages import RuntimeState

        path = str(card.run_dir / f"bell-{name}")
        self._kind = Kind.WEIGHTS
        self._bell = Doorbell(path)
        self._ledger = Ledger.open(card.ledger.path)
        budget = self._ledger.budget
        self._owner = self._ledger.join(name, floor=budget, ceiling=budget, priority=0, bell=path)
        self._owner.set_state(RuntimeState.WAKING)

    def free_bytes(self) -> int:
        return self._ledger.totals().free * (2 * MIB)

    def take(self, size_bytes: int, timeout_s: float = 5.0) -> float | None:
        """Seconds until so much was leased to us; None if it did not come."""
        granules = size_bytes // (2 * MIB)
        began = time.monotonic()
        asked_at = -1.0
        while not self._owner.try_reserve(self._kind, granules):
            now = time.monotonic()
            if now - began > timeout_s:
                return None
            if now - asked_at > 0.25:
                asked_at = now
                self._owner.post_targets(granules, 0.25)
            time.sleep(0.0005)
        return time.monotonic() - began

    def give_back(self) -> None:
        self._owner.release(self._kind, self._owner.held(self._kind))

    def close(self) -> None:
        self.give_back()
        self._owner.leave()
        self._ledger.close()


# ---------------------------------------------------------------- NVML


@dataclass(frozen=True)
class CardInfo:
    name: str
    driver: str
    total_bytes: int


def card_info() -> CardInfo:
    """Of card 0; "no card" where there is none, so that scripts can be tried without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(0)
        return CardInfo(
            name=_text(pynvml.nvmlDeviceGetName(card)),
            driver=_text(pynvml.nvmlSystemGetDriverVersion()),
            total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(card).total),
        )
    except Exception as error:  # pynvml missing, no driver: NVML's classes are not importable then
        return CardInfo(f"no card ({type(error).__name__})", "", 80 * GIB)


def card_used_mib() -> float:
    """What the whole card holds now."""
    import pynvml

    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used) / MIB


def process_mib(pids: Sequence[int] | None = None) -> dict[int, float]:
    """MiB on the card of each process (of ``pids``), as the driver counts them."""
    import pynvml

    pynvml.nvmlInit()
    card = pynvml.nvmlDeviceGetHandleByIndex(0)
    found = {
        int(process.pid): (process.usedGpuMemory or 0) / MIB
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    }
    return found if pids is None else {pid: mib for pid, mib in found.items() if pid in pids}


def settled_mib(read: Callable[[], float], seconds: float = 1.0) -> float:
    """A reading that stayed the same for 0.2 s; the driver gives memory back a little later."""
    deadline = time.monotonic() + seconds
    before = read()
    while True:
        time.sleep(0.2)
        now = read()
        if now == before or time.monotonic() > deadline:
            return now
        before = now


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


# ---------------------------------------------------------------- models, backends, time


def ensure_models(*names: str) -> list[Path]:
    """Random-weight model folders in /dev/shm, made once, one process each (25 to 50 s for the 8B)."""
    makers = {}
    for name in dict.fromkeys(names):
        if not (MODELS_DIR / name / "model.safetensors.index.json").exists():  # written last
            say(f"making {name} in {MODELS_DIR}")
            command = [sys.executable, str(_model_maker()), name, str(MODELS_DIR / name)]
            makers[name] = subprocess.Popen(command)
    for name, maker in makers.items():
        if maker.wait() != 0:
            raise SystemExit(f"make_model.py {name} failed")
    return [MODELS_DIR / name for name in names]


def _model_maker() -> Path:
    for folder in (ROOT / ".gpu/box", ROOT.parent / "shared/gpu"):
        if (folder / "make_model.py").exists():
            return folder / "make_model.py"
    raise SystemExit("make_model.py is neither in .gpu/box nor in ../shared/gpu")


def attention_backend() -> str:
    """FA3 where its kernels are, else Triton; looked up without importing them."""
    spec = importlib.util.find_spec("sgl_kernel")
    places = list(spec.submodule_search_locations or []) if spec else []
    return "fa3" if any(list(Path(place).glob("flash_ops*.so")) for place in places) else "triton"


def find_kvcached() -> Path | None:
    """The site folder that holds kvcached and its hook, or None."""
    spec = importlib.util.find_spec("kvcached")
    if spec is None or not spec.origin:
        return None
    return Path(spec.origin).parent.parent


def kvcached_environment(folder: Path, name: str) -> dict[str, str] | None:
    """What a process needs in its environment to run with kvcached's hook; None if kvcached is not importable.

    Its hook is a .pth file, which Python reads in site folders only, not on PYTHONPATH.
    """
    site_folder = find_kvcached()
    if site_folder is None:
        return None
    hooks = folder / "sitecustomize"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site_folder)!r})\n")
    return {
        "ENABLE_KVCACHED": "1",
        "KVCACHED_AUTOPATCH": "1",
        "KVCACHED_IPC_NAME": f"pb_{os.getpid()}_{name}",
        "PYTHONPATH": os.pathsep.join([str(hooks), os.environ.get("PYTHONPATH", "")]),
    }


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """The whole benchmark ends after so long, whatever hangs: children are killed on the way out."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, over)
    other_timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTimeError as error:
        say(f"STOPPED: {error}; the rows so far are written")
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *other_timer)


def open_results(name: str) -> Results:
    info = card_info()
    say(f"{name} on {info.name}, driver {info.driver}, attention {attention_backend()}")
    return Results(name, card=info.name, driver=info.driver)
