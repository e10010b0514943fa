"""What a benchmark needs inside the scheduler process of our engines, beside the product's own methods."""

from __future__ import annotations

from typing import Any

from prism_sgl.engine.early_children import prepare_scheduler


def prepare() -> None:
    """The product's imports and hooks, and one more method for SGLang's rpc."""
    prepare_scheduler()
    from sglang.srt.managers.scheduler import Scheduler

    Scheduler.prism_grow = _grow


def _grow(scheduler: Any, size_bytes: int) -> None:
    """Return once so many bytes of KV more are usable than now, asking the neighbours as a runtime short of KV does."""
    from prism_sgl.engine.runtime_memory import RuntimeMemory

    point = RuntimeMemory.current().safe_point
    assert point is not None
    token_bytes = point.allocator.elastic.pages.block_bytes // point.allocator.page_size
    if not point.ensure_usable(point.allocator.usable_tokens() + size_bytes // token_bytes):
        raise RuntimeError("the memory did not come")
