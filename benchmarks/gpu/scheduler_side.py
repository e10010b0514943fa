"""What a benchmark needs inside the scheduler process of our engines, beside the product's own methods."""

from __future__ import annotations

import gc
import logging
import math
import time
from typing import Any

from prism_sgl.engine.early_children import prepare_scheduler

log = logging.getLogger(__name__)

# A wish that was not fulfilled for so long is given up.
_PATIENCE_S = 5.0


def prepare() -> None:
    """The product's imports and hooks, and three more methods for SGLang's rpc."""
    prepare_scheduler()
    from sglang.srt.managers.scheduler import Scheduler

    Scheduler.prism_grow = _grow
    Scheduler.prism_tensors = _tell_tensors
    Scheduler.prism_fill = _fill_new_pages


def _grow(scheduler: Any, size_bytes: int) -> None:
    """Want so many bytes of KV beside all that is free now. Returns at once: what comes is logged."""
    from prism_sgl.engine.runtime_memory import RuntimeMemory
    from prism_sgl.units import GRANULE_BYTES

    memory = RuntimeMemory.current()
    assert memory.safe_point is not None
    _Wish(memory.safe_point, memory.ledger.totals().free * GRANULE_BYTES + size_bytes)


class _Wish:
    """KV that an engine wants as if for a request that waits, while its running ones decode on.

    SafePoint counts what waits, asks the neighbours and takes what comes, one look a turn: all of that is the product's
    own way. Only the request does not exist. The time is from the rpc's arrival in the scheduler to the mapped page.
    """

    def __init__(self, point: Any, size_bytes: int) -> None:
        self._began = time.monotonic()
        self._point = point
        self._size_bytes = size_bytes
        pages = math.ceil(size_bytes / point.allocator.elastic.pages.page_bytes)
        self._goal: int = point.allocator.usable_tokens() + pages * point.allocator.page_tokens
        self._turns = 0
        self._original = point._waiting_tokens, point.grow
        point._waiting_tokens, point.grow = self._waiting_tokens, self._grow

    def _waiting_tokens(self, running_batch: Any) -> int:
        """So many that SafePoint lacks what is missing, whatever it has to spare."""
        self._turns += 1
        count, _ = self._original
        waiting = int(count(running_batch))
        if time.monotonic() - self._began > _PATIENCE_S:
            self._end(f"the memory did not come within {_PATIENCE_S:.0f} s")
            return waiting
        point = self._point
        spare = point.allocator.available_size() - waiting - point._running_tokens(running_batch)
        return waiting + max(0, int(spare)) + self._missing()

    def _grow(self, tokens: int) -> int:
        _, grow = self._original
        gained = int(grow(tokens))
        if not self._missing():
            spent_ms = (time.monotonic() - self._began) * 1e3
            self._end(f"{self._size_bytes >> 20} MiB more after {spent_ms:.2f} ms in {self._turns} turns")
        return gained

    def _missing(self) -> int:
        return max(0, self._goal - int(self._point.allocator.usable_tokens()))

    def _end(self, how: str) -> None:
        self._point._waiting_tokens, self._point.grow = self._original
        log.info("grow: %s", how)


def _fill_new_pages(scheduler: Any, byte: int) -> None:
    """KV pages that are mapped from now on are full of this byte when they can first be read."""
    from prism_sgl.allocator.cuda_calls import CudaCalls
    from prism_sgl.engine.runtime_memory import RuntimeMemory

    pool = RuntimeMemory.current().kv
    assert pool is not None
    arena: Any = pool.vmm
    calls = arena._calls
    # Weights' arenas fill nothing, so this is seen by KV only.
    calls.fill = lambda address, _, size_bytes, stream: CudaCalls.fill(
        calls, address, byte, size_bytes, stream
    )
    arena._zeroed = True


def _tell_tensors(scheduler: Any, least_bytes: int) -> None:
    """Log what torch holds on the card: its large tensors by shape, and what no tensor of Python's accounts for."""
    import torch

    from prism_sgl.engine.runtime_memory import RuntimeMemory

    memory = RuntimeMemory.current()
    arenas = [part.vmm for part in (memory.kv, memory.weights) if part is not None]
    seen: dict[int, torch.Tensor] = {}
    for held in gc.get_objects():
        if isinstance(held, torch.Tensor) and held.is_cuda:
            storage = held.untyped_storage()
            if not any(a.base <= storage.data_ptr() < a.base + a.size_bytes for a in arenas):
                seen.setdefault(storage.data_ptr(), held)
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in seen.items()}
    for address, size_bytes in sorted(sizes.items(), key=lambda item: -item[1]):
        if size_bytes >= least_bytes:
            tensor = seen[address]
            log.info("torch: tensor %.1f MiB %s %s", size_bytes / 2**20, tuple(tensor.shape), tensor.dtype)
    allocated = torch.cuda.memory_allocated()
    log.info(
        "torch: %.1f MiB reserved, %.1f allocated, %.1f in %d tensors",
        torch.cuda.memory_reserved() / 2**20,
        allocated / 2**20,
        sum(sizes.values()) / 2**20,
        len(sizes),
    )
