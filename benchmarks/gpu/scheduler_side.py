"""What a benchmark needs inside the scheduler process of our engines, beside the product's own methods."""

from __future__ import annotations

import gc
import logging
import math
from typing import Any

from prism_sgl.engine.early_children import prepare_scheduler

log = logging.getLogger(__name__)


def prepare() -> None:
    """The product's imports and hooks, and two more methods for SGLang's rpc."""
    prepare_scheduler()
    from sglang.srt.managers.scheduler import Scheduler

    Scheduler.prism_grow = _grow
    Scheduler.prism_tensors = _tell_tensors


def _grow(scheduler: Any, size_bytes: int) -> None:
    """Return once so many bytes of KV more are usable than now, asking the neighbours as a runtime short of KV does."""
    from prism_sgl.engine.runtime_memory import RuntimeMemory

    point = RuntimeMemory.current().safe_point
    assert point is not None
    wanted = math.ceil(size_bytes / point.allocator.elastic.pages.page_bytes) * point.allocator.page_tokens
    if not point.ensure_usable(point.allocator.usable_tokens() + wanted):
        raise RuntimeError("the memory did not come")


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
