"""One card for one benchmark: ledger, image store, and the engines of all kinds on it, ended together."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.gpu.children import Child, ChildError, Engine
from benchmarks.gpu.installed import attention_backend, kvcached_environment
from benchmarks.gpu.session import say
from prism_sgl.allocator.ledger_views import OwnerView
from prism_sgl.units import GRANULE_BYTES

PAGE_BYTES = 128 << 20
CARD = "benchmarks.gpu.card_process:CardHandler"
_LOG_LINES_KEPT = 400

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

    def owner(self, engine: Engine) -> OwnerView:
        """What the ledger says of this one of our runtimes."""
        return next(o for o in self.ledger.owners() if o.name.startswith(f"{engine.name}@"))

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
        return self._ledger.totals().free * GRANULE_BYTES

    def take(self, size_bytes: int, timeout_s: float = 5.0) -> float | None:
        """Seconds until so much was leased to us; None if it did not come."""
        granules = size_bytes // GRANULE_BYTES
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
        self._bell.close()
