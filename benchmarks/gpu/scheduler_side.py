"""What a benchmark needs inside the scheduler process of our engines, beside the product's own methods."""

from __future__ import annotations

import bisect
import gc
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

from prism_sgl.engine.early_children import prepare_scheduler

log = logging.getLogger(__name__)

# A wish that was not fulfilled for so long is given up.
_PATIENCE_S = 5.0
# So many of torch's blocks are told one by one, largest first.
_TENSORS_TOLD = 20


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
        self._turns: list[str] = []  # of each turn in the safe point: begin, pages mapped, how long that took
        self._original = point._waiting_tokens, point.grow
        point._waiting_tokens, point.grow = self._waiting_tokens, self._grow

    def _waiting_tokens(self, running_batch: Any) -> int:
        """So many that SafePoint lacks what is missing, whatever it has to spare or might evict.

        It asks neighbours only for what its own prefix cache cannot give; ended requests of the requester's are that.
        """
        self._turns.append(f"{self._spent_ms():.1f}")
        count, _ = self._original
        waiting = int(count(running_batch))
        if time.monotonic() - self._began > _PATIENCE_S:
            self._end(f"the memory did not come within {_PATIENCE_S:.0f} s")
            return waiting
        point = self._point
        spare = point.allocator.available_size() - waiting - point._running_tokens(running_batch.reqs)
        return waiting + max(0, int(spare)) + int(point.tree.evictable_size()) + self._missing()

    def _grow(self, tokens: int) -> int:
        _, grow = self._original
        before_ms = self._spent_ms()
        gained = int(grow(min(tokens, self._missing())))
        now_ms = self._spent_ms()
        pages = gained // self._point.allocator.page_tokens
        self._turns[-1] += f" (mapped {pages} pages in {now_ms - before_ms:.1f})"
        if not self._missing():
            self._end(
                f"{self._size_bytes >> 20} MiB more after {now_ms:.2f} ms, turns at " + ", ".join(self._turns)
            )
        return gained

    def _spent_ms(self) -> float:
        return (time.monotonic() - self._began) * 1e3

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
    """Log what torch holds on the card: its large blocks by the tensors in them, and what no tensor accounts for."""
    import torch

    found: dict[tuple[int, int], torch.Tensor] = {}  # by the storage: its address and size
    for held in gc.get_objects():
        if isinstance(held, torch.Tensor) and held.is_cuda:
            storage = held.untyped_storage()
            found.setdefault((storage.data_ptr(), storage.nbytes()), held)
    blocks = [
        (block["address"], block["size"])
        for segment in torch.cuda.memory_snapshot()
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    used = blocks_in_use(blocks, found)
    largest = sorted(used.items(), key=lambda item: -item[0][1])
    for (_, size_bytes), storage_key in largest[:_TENSORS_TOLD]:
        if size_bytes >= least_bytes:
            tensor = found[storage_key]
            log.info("torch: tensor %.1f MiB %s %s", size_bytes / 2**20, tuple(tensor.shape), tensor.dtype)
    log.info(
        "torch: %.1f MiB reserved, %.1f allocated, %.1f in %d blocks of tensors",
        torch.cuda.memory_reserved() / 2**20,
        torch.cuda.memory_allocated() / 2**20,
        sum(size_bytes for _, size_bytes in used) / 2**20,
        len(used),
    )


def blocks_in_use(
    blocks: Iterable[tuple[int, int]], storages: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Blocks of torch's allocator that a storage lies in, and the largest such storage; all as (address, bytes).

    Storages do not add up: prefill graphs keep views of their pool by bare address (weak_ref_tensor), each with a
    storage of its own, one inside the other or of memory that is allocated no more. Nor are arenas of ours blocks.
    """
    ordered = sorted(blocks)
    addresses = [address for address, _ in ordered]
    used: dict[tuple[int, int], tuple[int, int]] = {}
    for storage in storages:
        number = bisect.bisect_right(addresses, storage[0]) - 1
        if number < 0 or storage[0] >= sum(ordered[number]):
            continue
        known = used.setdefault(ordered[number], storage)
        if storage[1] > known[1]:
            used[ordered[number]] = storage
    return used
