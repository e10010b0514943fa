"""Sleep and wake inside the scheduler process, as methods that SGLang's own rpc calls between batches.

``Scheduler.handle_rpc_request`` (srt/managers/scheduler.py:4304) runs any method by name and answers with success
or the text of the exception; the worker (control.py) is the caller.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NoReturn

from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from prism_sgl import footprint
from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.allocator.ledger import Kind
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.engine import page_eviction
from prism_sgl.engine.control import BUSY, SHORTAGE
from prism_sgl.engine.overhead import prefill_bytes
from prism_sgl.engine.runtime_memory import START_TIMEOUT_S, RuntimeMemory, ShortageError
from prism_sgl.engine.safe_point import SafePoint
from prism_sgl.engine.support import refuse_other_prefix_cache
from prism_sgl.errors import PrismError
from prism_sgl.messages import RuntimeFacts, RuntimeState
from prism_sgl.units import granules, round_up

log = logging.getLogger(__name__)


class BusyError(PrismError):
    """Requests are in the engine; it cannot sleep now. Nothing has changed."""


def bind(scheduler: Any) -> RuntimeFacts:
    """The engine is complete: fix the floor, take it, and tell what only the engine knows.

    Raises:
        ShortageError: the floor never came.
        UnsupportedModelError: SGLang has built a prefix cache that we do not know.
    """
    memory = RuntimeMemory.current()
    refuse_other_prefix_cache(scheduler.tree_cache, memory.spec.model)
    point = memory.safe_point = SafePoint(scheduler, memory)
    pool = point.allocator.elastic
    token_bytes = point.allocator.layout.block_bytes // point.allocator.page_size
    full_bytes = footprint.floor_bytes(
        request_tokens=scheduler.model_config.context_len,
        block_tokens=point.allocator.page_size,
        token_bytes=token_bytes,
        page_bytes=memory.spec.kv_page_bytes,
    )
    ceiling = granules(pool.vmm.size_bytes)
    floor = min(_whole_pages(pool, max(memory.spec.floor_bytes, full_bytes)), ceiling)
    memory.owner.set_quota(floor, ceiling)
    point.allocator.rehearse()
    page_eviction.rehearse(point.allocator)
    memory.device.trim()
    memory.overhead.settle(0)
    asleep = memory.owner.held(Kind.OVERHEAD)
    allowance_bytes = _allowance_bytes(scheduler)
    if not memory.overhead.settle(allowance_bytes, START_TIMEOUT_S):
        raise ShortageError(
            f"{memory.spec.model}: no room for {allowance_bytes >> 20} MiB of activations on {memory.spec.device}"
        )
    if not point.ensure_usable(scheduler.max_req_len):
        raise ShortageError(
            f"{memory.spec.model}: no room for min_kv on {memory.spec.device}{memory.who_is_in_the_way()}"
        )
    memory.overhead.cap()
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
        awake_overhead_bytes=(memory.owner.held(Kind.OVERHEAD) - asleep) * GRANULE_BYTES,
    )


def _allowance_bytes(scheduler: Any) -> int:
    """What passes will take beside pages when there are requests."""
    chunk = scheduler.server_args.chunked_prefill_size
    tokens = chunk if chunk and chunk > 0 else scheduler.max_req_len
    return prefill_bytes(scheduler.model_config, min(tokens, scheduler.max_req_len))


def _rest(memory: RuntimeMemory, state: RuntimeState) -> None:
    """Idle in this state, and asking nobody for anything any more."""
    memory.owner.set_state(state)
    memory.owner.set_activity(False, 0, time.monotonic_ns())


def _complete() -> tuple[RuntimeMemory, SafePoint]:
    memory = RuntimeMemory.current()
    assert memory.safe_point is not None, "the scheduler is not complete yet"
    return memory, memory.safe_point


def prism_sleep(scheduler: Any, keep_weights: bool, preempt: bool = False) -> None:
    """Drop KV and prefix cache; the weights stay in the image.

    ``keep_weights``: those on the device stay too, until neighbours ask for their pages, so that waking costs only
    what was taken. Else all is unmapped at once.
    ``preempt``: running requests go back to the engine's queue and are answered further after the wake; their prompts
    and what they have of their answers are prefilled again then.

    Raises:
        BusyError: requests are in the engine, and ``preempt`` is not said.
        VmmError: the device failed. Nothing is admitted any more; the worker ends the engine (worker.py).
    """
    memory, point = _complete()
    assert memory.weights is not None
    began = time.perf_counter()
    given_bytes = memory.pages_bytes()
    if not point.asleep:
        if scheduler.is_fully_idle():
            scheduler.flush_cache(empty_cache=False)
        elif preempt:
            _set_aside(scheduler)
        else:
            raise BusyError(f"{BUSY}requests are in the engine")
        if used := point.allocator.used_blocks():
            raise BusyError(f"{BUSY}{used} blocks of KV are in use")
        point.asleep = True  # whatever fails from here on, nothing is admitted to pages that are gone
        # Unmapping is not ordered by streams: nothing may be under way, nor the surplus step of an overlapped turn.
        memory.device.synchronize()
        if memory.arrival is not None:
            memory.arrival.wait()
        point.giving.forget()
        point.allocator.drop_all()
        memory.device.trim()
        memory.overhead.settle(0, 0.0)
    if not keep_weights:
        memory.weights.sleep()
    _rest(memory, RuntimeState.ASLEEP)
    given_bytes -= memory.pages_bytes()
    log.info(
        "sleep: gave back %d MiB in %.3f s; beside pages %s",
        given_bytes >> 20,
        time.perf_counter() - began,
        memory.overhead,
    )


def _set_aside(scheduler: Any) -> None:
    """All that runs waits in the queue, and nothing is cached any more."""
    # SGLang's own way for weights that change (srt/managers/scheduler.py:4465). Its pause would stop the loop in which
    # a sleeper answers its neighbours, so that ends at once: asleep, nothing is admitted (safe_point.py).
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    scheduler.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
    scheduler.tree_cache.evict(EvictParams(num_tokens=scheduler.tree_cache.evictable_size()))
    log.info("sleep: %d requests wait for the wake", len(scheduler.waiting_queue))


def prism_wake(scheduler: Any, timeout_s: float, wait: bool) -> None:
    """Reserve, map and copy in what is missing of the weights, then the floor of KV.

    ``wait`` until the copies are done; else passes wait for them on the card (arrival.py).

    Raises:
        ShortageError: memory did not come in ``timeout_s``. It sleeps; weights that have come stay for the next try,
            or until neighbours ask for them.
        VmmError: the device failed. The worker ends the engine (worker.py), which gives everything back.
    """
    memory, point = _complete()
    weights, arrival = memory.weights, memory.arrival
    assert weights is not None and arrival is not None
    if not point.asleep:
        return
    began = time.perf_counter()
    missing_bytes = weights.missing_bytes
    memory.owner.set_state(RuntimeState.WAKING)
    if memory.insist(weights.wake, missing_bytes, timeout_s) is None:
        _sleep_on(memory, f"{missing_bytes >> 20} MiB of weights")
    if missing_bytes:
        arrival.begin()
    mapped = time.perf_counter()
    allowance_bytes = _allowance_bytes(scheduler)
    if not memory.overhead.settle(allowance_bytes, timeout_s):
        _sleep_on(memory, f"{allowance_bytes >> 20} MiB of activations")
    page_bytes = point.allocator.elastic.pages.page_bytes
    if memory.insist(point.allocator.reopen, page_bytes, timeout_s) is None:
        memory.overhead.settle(0, 0.0)
        _sleep_on(memory, "the first page of KV")
    point.asleep = False
    # The rest of the floor comes with the first request's safe points; what is free is taken now, at once.
    point.grow(scheduler.max_req_len)
    memory.overhead.cap()
    kv_mapped = time.perf_counter()
    if wait:
        arrival.wait()
    _rest(memory, RuntimeState.AWAKE)
    log.info(
        "wake: %d MiB of weights mapped in %.4f s, %d MiB of KV in %.4f s, waited %.3f s for the copy",
        missing_bytes >> 20,
        mapped - began,
        point.allocator.elastic.mapped_bytes >> 20,
        kv_mapped - mapped,
        time.perf_counter() - kv_mapped,
    )


def _sleep_on(memory: RuntimeMemory, missing: str) -> NoReturn:
    """The wake ends here. What has come of the weights may be given to neighbours, so nothing may still be copied."""
    assert memory.arrival is not None
    memory.arrival.wait()
    _rest(memory, RuntimeState.ASLEEP)
    raise ShortageError(f"{SHORTAGE}no room for {missing}{memory.who_is_in_the_way()}")


def prism_quota(scheduler: Any, floor_bytes: int, ceiling_bytes: int) -> None:
    """New floor and ceiling of KV from the router."""
    memory = RuntimeMemory.current()
    assert memory.kv is not None
    ceiling = granules(ceiling_bytes)
    memory.owner.set_quota(min(_whole_pages(memory.kv, floor_bytes), ceiling), ceiling)


def _whole_pages(pool: ElasticPool, size_bytes: int) -> int:
    """A floor, in granules. Only pages are given: below a floor within a page a victim would take the page back."""
    return granules(round_up(size_bytes, pool.pages.page_bytes))
