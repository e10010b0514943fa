"""What a runtime does for its memory once a turn, at the one place where it may change.

SGLang decides each turn in ``Scheduler.get_next_batch_to_run`` (srt/managers/scheduler.py:2925). Just before,
messages are handled and nothing is being allocated: the lease may change there and nowhere else, since
admission reads ``available_size()`` many times a pass (schedule_policy.py:569-623) and a failed ``alloc`` after it
kills the scheduler. Three things happen there, in this order: answer a neighbour's target, grow for the work at hand,
and un-stick admission (``batch_is_full``, set at scheduler.py:3246, is never reset on an empty batch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from prism_sgl.engine import strangers
from prism_sgl.engine.giving import Giving, answers_tokens, chunk_rest, not_merged
from prism_sgl.engine.runtime_memory import TARGET_DEADLINE_S, RuntimeMemory
from prism_sgl.engine.slots import ElasticAllocator
from prism_sgl.units import granules

# Costs are per call, not per byte: a runtime that grows takes at least this many pages at once, if they are free.
_GROW_PAGES = 4
# The last running request waits this long for its runtime's floor before SGLang may abort it.
_FLOOR_TIMEOUT_S = 60.0
_RETRY_S = 0.002
# What neighbours are about to give is taken when all of it is there, if it comes within so long. Unmapping in one
# process and mapping in another stand in each other's way: beside a victim's unmapping each page of 128 MiB took 1 ms
# to map, after it 0.1 to 0.2 (H200, 2026-11-29).
_COMES_WITHIN_S = 0.05
_STEPS_MEANWHILE = 32  # of decoding, at most: a 1B's step takes 2 ms


class SafePoint:
    """Keeps one scheduler's lease in step with its work and its neighbours' needs."""

    def __init__(self, scheduler: Any, memory: RuntimeMemory) -> None:
        self.scheduler = scheduler
        self.memory = memory
        self.allocator: ElasticAllocator = scheduler.token_to_kv_pool_allocator
        self.tree = scheduler.tree_cache
        self.asleep = False  # no KV is mapped, of the weights what neighbours have left
        self._device_was_short = False
        self.giving = Giving(scheduler, memory)
        self._was_idle = False
        self._asked_at = -math.inf
        self._tried_at = -math.inf

    # -- the hook

    def next_batch(self, original: Callable[..., Any], running_batch: Any, last_batch: Any) -> Any:
        # A ring that nobody takes would keep the idle engine's poll from ever sleeping.
        self.memory.bell.drain()
        if self.asleep:
            self.giving.give_weights()
            plan = original(self.scheduler, running_batch=running_batch, last_batch=last_batch)
            if self.scheduler.waiting_queue:
                # Requests that wait for the wake: SGLang does not call that idle, and would turn without pause.
                self.scheduler.maybe_sleep_on_idle()
            return plan
        if self.memory.arrival is not None:
            self.memory.arrival.look()
        # With overlap, what the pass before has computed is sent after this turn.
        first_tokens_due = last_batch is not None and last_batch.forward_mode.is_extend()
        self.memory.overhead.look(in_a_hurry=first_tokens_due or bool(self.scheduler.waiting_queue))
        self.giving.give_kv(running_batch, last_batch)
        self.allocator.tidy()
        merging = self._merging(running_batch, last_batch)
        short = self._grow_for_work(running_batch, merging)
        plan = original(self.scheduler, running_batch=running_batch, last_batch=last_batch)
        self._prepare_to_be_asked(
            plan.batch_to_run is None
            and last_batch is None
            and running_batch.is_empty()
            and not self.scheduler.waiting_queue
        )
        if plan.batch_to_run is None and self.scheduler.waiting_queue and short:
            # Admission waits for memory that a neighbour holds; without this pause the loop would spin on it.
            self.memory.bell.wait(_RETRY_S)
        return plan

    def new_prefill(self, original: Callable[..., Any], running_batch: Any) -> Any:
        """What neighbours are owed does not go to new requests. A prefill that is half done goes on all the same."""
        scheduler = self.scheduler
        if not (self.giving.owes or self.asleep):
            return original(scheduler, running_batch)
        running_batch.batch_is_full = True
        if not scheduler.enable_priority_preemption:
            return original(scheduler, running_batch)
        # Where requests have priorities SGLang takes that back (scheduler.py:3107), so nobody is seen to wait.
        waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
        try:
            return original(scheduler, running_batch)
        finally:
            scheduler.waiting_queue = waiting + scheduler.waiting_queue

    def _prepare_to_be_asked(self, idle: bool) -> None:
        """From the second idle turn on, which comes after the first one's sleep of a second: nobody waits for this."""
        if not idle:
            self.giving.forget()
        elif self._was_idle:
            self.giving.look_ahead()
        self._was_idle = idle

    # -- growing

    def _grow_for_work(self, running_batch: Any, merging: list[Any]) -> bool:
        """Take what the work at hand wants, free memory first; True if it cannot go on with what there is."""
        waiting = self._waiting_tokens(running_batch)
        running_requests = [*running_batch.reqs, *merging] if merging else running_batch.reqs
        busy = bool(waiting or running_requests)
        # At its ceiling an engine has nothing to ask for: its own prefix cache gives way. Nor while it owes.
        room = 0 if self.giving.owes else self.allocator.unmapped_tokens()
        # A loop over all running requests, in every decode step: only where its result counts.
        running = self._running_tokens(running_requests) if room or waiting else 0
        lacking = waiting + running - self.allocator.available_size()
        wanted = min(lacking, room)
        pause_s = strangers.RETRY_S if self._device_was_short else _RETRY_S
        if (
            wanted > 0
            and time.monotonic() - self._tried_at > pause_s
            and not self._is_coming(wanted, len(running_requests))
        ):
            self._tried_at = time.monotonic()
            gained = self.grow(wanted)
            wanted -= gained
            lacking -= gained
            running_batch.batch_is_full = False
        if not busy:
            self._device_was_short = False  # nobody waits any more, with what there is
        self.memory.strangers.look(self._device_was_short)
        if waiting and running_batch.is_empty():
            # Nobody will leave this batch and reset it, so a refusal must not outlive its turn.
            running_batch.batch_is_full = False
        missing = wanted - self.tree.evictable_size() if wanted > 0 else 0
        if missing > 0 and time.monotonic() - self._asked_at > TARGET_DEADLINE_S:
            self._asked_at = time.monotonic()
            page = granules(self.allocator.elastic.pages.page_bytes)
            self.memory.ask_neighbours(granules(self._bytes_for(missing)), page=page)
        self.memory.owner.set_activity(busy, granules(self._bytes_for(max(missing, 0))), time.monotonic_ns())
        return self.giving.owes or bool(lacking > self.tree.evictable_size())

    def _is_coming(self, tokens: int, num_running: int) -> bool:
        """Neighbours are giving what is missing of so much, and running requests can wait for it: who runs out of KV
        meanwhile would be sent back to the queue, so then what has come is taken at once.
        """
        if time.monotonic() - self._asked_at > _COMES_WITHIN_S or not self.memory.owner.owed():
            return False
        soon = num_running * (_STEPS_MEANWHILE + self.allocator.page_size)
        if self.allocator.available_size() + self.tree.evictable_size() < soon:
            return False
        return self.memory.ledger.totals().free < granules(self._bytes_for(tokens))

    def _merging(self, running_batch: Any, last_batch: Any) -> list[Any]:
        """Who has just been prefilled and will decode. What a half-done prefill still needs counts as waiting."""
        chunked = self.scheduler.chunked_req
        return [r for r in not_merged(running_batch, last_batch) if r is not chunked and not r.finished()]

    def grow(self, tokens: int) -> int:
        """Map pages for about ``tokens`` more tokens, as far as there are any; returns the tokens gained."""
        pages = max(math.ceil(tokens / self.allocator.page_tokens), _GROW_PAGES)
        shortages = self.allocator.elastic.device_shortages
        # Mapping is all or nothing: page by page where the device has less than the ledger says.
        ranges = self.allocator.elastic.grow_up_to(1 if self._device_was_short else pages)
        self.allocator.add_blocks(ranges)
        gained = sum(len(r) for r in ranges) * self.allocator.page_size
        self._device_was_short = self.allocator.elastic.device_shortages > shortages
        return gained

    def ensure_usable(self, tokens: int) -> bool:
        """Wait until pages for ``tokens`` tokens are mapped, used ones included; False if they never came.

        Only called when nothing else could go on anyway. The floor covers one request of full length and the
        router keeps the sum of floors within the budget, so somebody is above his floor and will give.
        """

        def missing() -> int:
            return max(0, tokens - self.allocator.usable_tokens())

        def attempt() -> bool:
            if missing():
                self.grow(missing())
            return not missing()

        return bool(self.memory.insist(attempt, lambda: self._bytes_for(missing()), _FLOOR_TIMEOUT_S))

    def _bytes_for(self, tokens: int) -> int:
        """Whole pages."""
        return math.ceil(tokens / self.allocator.page_tokens) * self.allocator.elastic.pages.page_bytes

    def _waiting_tokens(self, running_batch: Any) -> int:
        """What admission will ask for the waiting requests that may start now (PrefillAdder.add_one_req)."""
        slots = self.scheduler.max_running_requests - len(running_batch.reqs)
        block = self.allocator.page_size
        waiting = self.scheduler.waiting_queue[: max(slots, 0)]
        prompts = sum(len(r.origin_input_ids) + len(r.output_ids) for r in waiting)
        total = prompts + answers_tokens(waiting, no_cache=self.tree.disable) + 2 * block * len(waiting)
        chunked = self.scheduler.chunked_req
        if chunked is not None:
            total += chunk_rest(chunked) + answers_tokens([chunked], no_cache=self.tree.disable) + 2 * block
        return total

    def _running_tokens(self, requests: list[Any]) -> int:
        """What the running requests may still want: their whole answers, as admission counts them."""
        return answers_tokens(requests, no_cache=self.tree.disable) + self.allocator.page_size * len(requests)
