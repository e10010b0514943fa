"""Sleep and wake inside the scheduler process, as methods that SGLang's own rpc calls between batches.

``Scheduler.handle_rpc_request`` (srt/managers/scheduler.py:4304) runs any method by name and answers with success
or the text of the exception; the worker (control.py) is the caller.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from prism_sgl import footprint
from prism_sgl.allocator.ledger import Kind
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.engine.runtime_memory import RuntimeMemory, ShortageError, granules
from prism_sgl.engine.safe_point import SafePoint
from prism_sgl.errors import PrismError
from prism_sgl.messages import RuntimeFacts, RuntimeState

log = logging.getLogger(__name__)


class BusyError(PrismError):
    """Requests are in the engine; it cannot sleep now."""


def bind(scheduler: Any) -> RuntimeFacts:
    """The engine is complete: fix the floor, take it, and tell what only the engine knows.

    Raises:
        ShortageError: the floor never came.
    """
    memory = RuntimeMemory.current()
    point = memory.safe_point = SafePoint(scheduler, memory)
    pool = point.allocator.elastic
    token_bytes = pool.pages.block_bytes // point.allocator.page_size
    full_bytes = footprint.floor_bytes(
        request_tokens=scheduler.model_config.context_len,
        block_tokens=point.allocator.page_size,
        token_bytes=token_bytes,
        page_bytes=pool.pages.page_bytes,
    )
    floor = granules(max(memory.spec.floor_bytes, full_bytes))
    ceiling = granules(pool.vmm.size_bytes)
    floor = min(floor, ceiling)
    memory.owner.set_quota(floor, ceiling)
    if not point.ensure_usable(scheduler.max_req_len):
        raise ShortageError(f"{memory.spec.model}: no room for min_kv on {memory.spec.device}")
    _rest(memory, RuntimeState.AWAKE)
    return RuntimeFacts(
        weights_bytes=memory.owner.held(Kind.WEIGHTS) * GRANULE_BYTES,
        overhead_bytes=memory.owner.held(Kind.OVERHEAD) * GRANULE_BYTES,
        kv_bytes_per_token=token_bytes,
        max_request_tokens=scheduler.max_req_len,
        floor_bytes=floor * GRANULE_BYTES,
        ceiling_bytes=ceiling * GRANULE_BYTES,
        max_running_requests=scheduler.max_running_requests,
        block_tokens=point.allocator.page_size,
    )


def _rest(memory: RuntimeMemory, state: RuntimeState) -> None:
    """Idle in this state, and asking nobody for anything any more."""
    memory.owner.set_state(state)
    memory.owner.set_activity(False, 0, time.monotonic_ns())


def _complete() -> tuple[RuntimeMemory, SafePoint]:
    memory = RuntimeMemory.current()
    assert memory.safe_point is not None, "the scheduler is not complete yet"
    return memory, memory.safe_point


def prism_sleep(scheduler: Any) -> None:
    """Drop KV and prefix cache, unmap the weights; they stay in the image.

    Raises:
        BusyError: requests are in the engine. Nothing has changed.
    """
    memory, point = _complete()
    if memory.weights is None or not memory.weights.mapped:
        return
    if not scheduler.is_fully_idle():
        raise BusyError("requests are in the engine")
    began = time.perf_counter()
    given_bytes = point.allocator.elastic.mapped_bytes + memory.weights.vmm.size_bytes
    scheduler.flush_cache(empty_cache=False)
    point.allocator.drop_all()
    memory.weights.sleep()
    _rest(memory, RuntimeState.ASLEEP)
    log.info("sleep: gave back %d MiB in %.3f s", given_bytes >> 20, time.perf_counter() - began)


def prism_wake(scheduler: Any, timeout_s: float) -> None:
    """Reserve, map and copy the weights in, then the floor of KV.

    Raises:
        ShortageError: memory did not come in ``timeout_s``. Everything taken has been given back.
    """
    memory, point = _complete()
    weights = memory.weights
    assert weights is not None
    if weights.mapped:
        return
    began = time.perf_counter()
    memory.owner.set_state(RuntimeState.WAKING)
    if memory.insist(weights.wake, weights.vmm.size_bytes, timeout_s) is None:
        _rest(memory, RuntimeState.ASLEEP)
        raise ShortageError(f"shortage: no room for {weights.vmm.size_bytes >> 20} MiB of weights")
    copied = time.perf_counter()
    page_bytes = point.allocator.elastic.pages.page_bytes
    if memory.insist(point.allocator.reopen, page_bytes, timeout_s) is None:
        weights.sleep()
        _rest(memory, RuntimeState.ASLEEP)
        raise ShortageError("shortage: no room for the first page of KV")
    # The rest of the floor comes with the first request's safe points; what is free is taken now, at once.
    point.grow(scheduler.max_req_len)
    _rest(memory, RuntimeState.AWAKE)
    log.info(
        "wake: weights in %.3f s, %d MiB of KV in %.3f s more",
        copied - began,
        point.allocator.elastic.mapped_bytes >> 20,
        time.perf_counter() - copied,
    )


def prism_quota(scheduler: Any, floor_bytes: int, ceiling_bytes: int) -> None:
    """New floor and ceiling of KV from the router."""
    RuntimeMemory.current().owner.set_quota(granules(floor_bytes), granules(ceiling_bytes))
