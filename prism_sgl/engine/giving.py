"""Answering what neighbours ask for: what one runtime gives, in which order, and what it refrains from meanwhile.

Empty pages first, then prefix cache page by page, both only as far as running requests can still end. Running requests
go back to the queue only for a neighbour with a right to the memory (allocator/reclaim.py). While something is owed
nothing is admitted and nothing taken: an engine that admits what it has just sent back gives nothing, and prefills for
ever.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from prism_sgl.allocator.ledger import Kind, Target
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.engine.page_eviction import Eviction, Look
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.engine.slots import ElasticAllocator

log = logging.getLogger(__name__)

# Looking for what can be given waits for the device. While a target is not met, that is worth it so often.
_LOOK_AGAIN_S = 0.02
_LONGEST_REST = int(CLIP_MAX_NEW_TOKENS)


@dataclass
class Given:
    """What one turn gave, and when it had last chosen and unmapped something (monotonic seconds; 0: nothing yet)."""

    pages: int = 0
    lost_tokens: int = 0
    sent_back: int = 0  # running requests
    chosen_at: float = 0.0
    unmapped_at: float = 0.0

    def __iadd__(self, more: Given) -> Given:
        self.pages += more.pages
        self.lost_tokens += more.lost_tokens
        self.sent_back += more.sent_back
        self.chosen_at = max(self.chosen_at, more.chosen_at)
        self.unmapped_at = max(self.unmapped_at, more.unmapped_at)
        return self


class Giving:
    """Owner of the answer to this runtime's reclaim target. Called at safe points only."""

    def __init__(self, scheduler: Any, memory: RuntimeMemory) -> None:
        self.scheduler = scheduler
        self.memory = memory
        self.allocator: ElasticAllocator = scheduler.token_to_kv_pool_allocator
        self.tree = scheduler.tree_cache
        self.owes = False  # a target is not met yet
        self._looked_at = (-1, 0.0)  # sequence number of the target, and when
        self._ahead: Look | None = None

    # -- asleep

    def give_weights(self) -> None:
        """A sleeper's neighbours need memory: as many of its last pages as they ask for."""
        target, weights = self.memory.owner.target(), self.memory.weights
        if target is None:
            return
        assert weights is not None
        excess = self.memory.owner.held(Kind.WEIGHTS) - target.granules
        given = weights.give_back(math.ceil(excess * GRANULE_BYTES / weights.vmm.page_bytes))
        log.info(
            "reclaim: gave %d MiB of sleeping weights back, keeps %d MiB",
            given * weights.vmm.page_bytes >> 20,
            weights.vmm.mapped_bytes >> 20,
        )
        self.memory.owner.answer_target(target.seq)

    # -- awake

    def look_ahead(self) -> None:
        """For an idle engine, which is asked before others: what takes longest in choosing is done by then.

        A look and its arrays took 5 to 8 ms of a victim's time beside a decoding asker (H200, 2026-11-29).
        """
        if self._ahead is None or not self._ahead.holds:
            self._ahead = Look(self.tree, self.allocator)
            self._ahead.prepare()

    def forget(self) -> None:
        """What was seen is of use no more, and keeps memory of evicted nodes."""
        self._ahead = None

    def give_kv(self, running: Any, last: Any) -> None:
        """``running``: the batch that decodes; ``last``: of the turn before, which SGLang merges into it only later."""
        target = self.memory.owner.target()
        if target is None:
            self._settle(running, last)
            return
        now = time.monotonic()
        seq, looked_at = self._looked_at
        if self.owes and seq == target.seq and now - looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = target.seq, now
        given = self._give(target, running, last)
        if given.pages:
            log.info(
                "reclaim: gave %d MiB back to neighbours in %.1f ms (chosen after %.1f, unmapped after %.1f), "
                "lost %d cached tokens, keeps %d MiB of KV",
                given.pages * self.allocator.elastic.pages.page_bytes >> 20,
                (time.monotonic() - now) * 1e3,
                (given.chosen_at - now) * 1e3,
                (given.unmapped_at - now) * 1e3,
                given.lost_tokens,
                self.allocator.elastic.mapped_bytes >> 20,
            )
        if self._excess_pages(target.granules) <= 0 or not self.memory.owner.is_target_wanted():
            self.memory.owner.answer_target(target.seq)
            if not given.sent_back:
                self._settle(running, last)
                return
        # Whom this turn has sent back, it must not admit: the token of the pass in flight would still be added to the
        # answer, and be sampled again (batch_result_processor.py:848 leaves out who waits).
        self.owes = True

    def _settle(self, running: Any, last: Any) -> None:
        if self.owes:
            self.owes = False
            for batch in (running, last):
                if batch is not None:
                    batch.batch_is_full = False

    def _give(self, target: Target, running: Any, last: Any) -> Given:
        if self.scheduler.enable_overlap:
            # The forward in flight still writes slots that were freed meanwhile.
            self.scheduler.forward_stream.synchronize()
        merging = not_merged(running, last)
        given = self._give_pages(target, [*running.reqs, *merging])
        if self._excess_pages(target.enforced) > 0 and target.overdue(time.monotonic_ns()) and not merging:
            # Requests of a batch that is yet to be merged would keep the pages; in the next turn they are all in one.
            given += self._retract_to(target, running)
        return given

    def _give_pages(self, target: Target, requests: Iterable[Any]) -> Given:
        allowed = self._pages_to_give(target, requests)
        ahead, self._ahead = self._ahead, None
        seen = ahead if ahead is not None and ahead.holds else Look(self.tree, self.allocator)
        pages = self.allocator.empty_pages(seen.used)[:allowed]
        cached = self.tree.evictable_size()
        eviction = None
        if len(pages) < allowed and cached > 0:
            eviction = Eviction(seen, allowed - len(pages))
            pages += eviction.pages[: allowed - len(pages)]
        given = Given(chosen_at=time.monotonic())

        def let_go() -> None:
            given.unmapped_at = time.monotonic()
            if eviction is not None:
                eviction.carry_out()

        given.pages = self.allocator.drop_pages(pages, let_go)
        given.lost_tokens = cached - self.tree.evictable_size()
        return given

    def _pages_to_give(self, target: Target, requests: Iterable[Any]) -> int:
        """What is asked for, as far as these requests can end without it, and by right as far as it is not used.

        Later chunks of a chunked prefill are allocated without a new admission test, so what they need stays.
        """
        free = self.allocator.available_size() + self.tree.evictable_size() - self._chunked_tokens()
        page_tokens = self.allocator.page_tokens
        can_end = min(self._excess_pages(target.granules), (free - self._rest_of(requests)) // page_tokens)
        by_right = min(self._excess_pages(target.enforced), free // page_tokens)
        return int(max(can_end, by_right, 0))

    def _chunked_tokens(self) -> int:
        chunked = self.scheduler.chunked_req
        return 0 if chunked is None else chunk_rest(chunked) + 2 * self.allocator.page_size

    def _rest_of(self, requests: Iterable[Any]) -> int:
        """Tokens that they will still write, by SGLang's own estimate (schedule_policy.py:559)."""
        requests, no_cache = list(requests), self.tree.disable
        exact = answers_tokens((r for r in requests if r.sampling_params.ignore_eos), no_cache=no_cache)
        likely = answers_tokens((r for r in requests if not r.sampling_params.ignore_eos), no_cache=no_cache)
        ratio: float = self.scheduler.new_token_ratio_tracker.current
        return math.ceil(exact + likely * ratio + self.allocator.page_size * len(requests))

    def _excess_pages(self, granules: int) -> int:
        excess = self.memory.owner.held(Kind.KV) - granules
        return math.ceil(excess * GRANULE_BYTES / self.allocator.elastic.pages.page_bytes)

    def _retract_to(self, target: Target, batch: Any) -> Given:
        """Send running requests back to the queue, youngest answers first, until what is enforced is given.

        They lose nothing but time: SGLang prefills prompt and answer so far again (schedule_batch.py:2734).
        One stays: the floor is at least one request of full length.
        """
        given = Given()
        if batch.is_empty():
            return given
        batch.filter_batch()
        keep = batch._get_decode_retraction_order(batch.reqs, self.scheduler.server_args)
        retracted = []
        # As many at once as hold what is missing, for each look at what has come free waits for the device.
        while len(keep) > 1 and (excess := self._excess_pages(target.enforced)) > 0:
            missing = excess * self.allocator.page_tokens
            while len(keep) > 1 and missing > 0:
                index = keep.pop()
                request = batch.reqs[index]
                retracted.append(request)
                missing -= len(request.origin_input_ids) + len(request.output_ids)
                batch.release_req(index, len(keep), self.scheduler.server_args)
            given += self._give_pages(target, [batch.reqs[index] for index in keep])
        given.sent_back = len(retracted)
        if retracted:
            batch.filter_batch(keep_indices=keep)
            for request in retracted:
                self.scheduler._add_request_to_queue(request, is_retracted=True)
            log.info("reclaim: %d running requests wait again", len(retracted))
        return given


def not_merged(running: Any, last: Any) -> list[Any]:
    """Requests whose prefill is in flight: SGLang adds them to those that decode in this turn (scheduler.py:2984)."""
    if last is None or last is running or not last.forward_mode.is_extend() or last.is_empty():
        return []
    return list(last.reqs)


def answers_tokens(requests: Iterable[Any], *, no_cache: bool) -> int:
    """Tokens that admission reserves for the rests of these answers (schedule_policy.py:559).

    ``no_cache``: SGLang has no prefix cache, and then reserves all of an answer that ignores its end (:936).
    """
    total = 0
    for request in requests:  # no call in it: it runs in every decode step
        sampling = request.sampling_params
        rest: int = sampling.max_new_tokens - len(request.output_ids)
        if rest > 0:
            total += rest if rest < _LONGEST_REST or (no_cache and sampling.ignore_eos) else _LONGEST_REST
    return total


def chunk_rest(chunked: Any) -> int:
    """Tokens of a chunked prefill that are still to come."""
    return max(0, len(chunked.origin_input_ids) + len(chunked.output_ids) - len(chunked.prefix_indices))
