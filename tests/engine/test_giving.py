"""What a victim gives, with SGLang's real allocator and tree, a real ledger, and batches that stand in for SGLang's."""

from __future__ import annotations

import gc
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.engine.giving import Giving
from prism_sgl.messages import RuntimeState
from tests.engine.elastic_fixture import Elastic, make_elastic

PAGE_TOKENS = 64
NUM_PAGES = 20


class Request:
    """Holds slots; its answer has ``rest`` tokens to come."""

    def __init__(self, slots: torch.Tensor, rest: int) -> None:
        self.slots = slots
        self.origin_input_ids = range(len(slots))
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(max_new_tokens=rest, ignore_eos=True)


class Batch:
    """As much of ``ScheduleBatch`` as a victim uses."""

    def __init__(self, elastic: Elastic, reqs: list[Request], *, extend: bool = False) -> None:
        self.elastic = elastic
        self.reqs = reqs
        self.batch_is_full = False
        self.forward_mode = SimpleNamespace(is_extend=lambda: extend)

    def is_empty(self) -> bool:
        return not self.reqs

    def filter_batch(self, keep_indices: list[int] | None = None) -> None:
        if keep_indices is not None:
            self.reqs = [self.reqs[index] for index in keep_indices]

    def _get_decode_retraction_order(self, reqs: list[Request], server_args: Any) -> list[int]:
        return list(range(len(reqs)))

    def release_req(self, index: int, remaining: int, server_args: Any) -> None:
        self.elastic.allocator.free(self.reqs[index].slots)


class Victim:
    def __init__(self, elastic: Elastic) -> None:
        self.elastic = elastic
        self.queue: list[Request] = []
        self.last: Batch | None = None
        scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=elastic.allocator,
            tree_cache=elastic.tree,
            enable_overlap=False,
            chunked_req=None,
            server_args=None,
            new_token_ratio_tracker=SimpleNamespace(current=0.5),
            _add_request_to_queue=lambda request, is_retracted: self.queue.append(request),
        )
        self.giving = Giving(scheduler, SimpleNamespace(owner=elastic.owner))  # type: ignore[arg-type]
        self.running = Batch(elastic, [])

    def run(self, tokens: int, rest: int) -> Request:
        slots = self.elastic.allocator.alloc(tokens)
        assert slots is not None
        request = Request(slots, rest)
        self.running.reqs.append(request)
        return request

    def finish(self, request: Request) -> None:
        self.running.reqs.remove(request)
        self.elastic.allocator.free(request.slots)

    def safe_point(self) -> None:
        self.giving._looked_at = (-1, 0.0)  # as if time had passed
        self.giving.give_kv(self.running, self.last)
        self.elastic.allocator.check()
        self.elastic.ledger.check()

    @property
    def pages(self) -> int:
        return self.elastic.owner.held(Kind.KV)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    elastic = make_elastic(
        tmp_path, token_bytes=32 * 1024, num_tokens=1600, block_tokens=1, budget_pages=NUM_PAGES + 1
    )
    elastic.grow(NUM_PAGES)
    elastic.owner.set_state(RuntimeState.AWAKE)
    elastic.owner.set_activity(True, 0, 1)
    yield Victim(elastic)
    elastic.ledger.close()


def neighbour(ledger: Ledger, *, floor: int) -> Owner:
    asker = ledger.join("asker", floor=floor, ceiling=NUM_PAGES, priority=0, bell="")
    asker.set_state(RuntimeState.AWAKE)
    asker.set_activity(True, 1, 1)
    return asker


def ask_in_vain(asker: Owner, granules: int) -> None:
    """The deadline has passed, and the asker still waits."""
    asker.post_targets(granules, 0.0)
    asker.post_targets(granules, 60.0)


def test_among_equals_running_requests_stay_and_memory_comes_as_they_end(victim: Victim) -> None:
    requests = [victim.run(4 * PAGE_TOKENS, 0) for _ in range(5)]  # all that is mapped but a little
    asker = neighbour(victim.elastic.ledger, floor=0)
    ask_in_vain(asker, 8)
    victim.safe_point()
    assert victim.giving.owes and not victim.queue
    assert victim.pages >= 5 * 4
    before = victim.pages
    victim.finish(requests[0])
    victim.finish(requests[3])
    victim.safe_point()
    assert before - victim.pages >= 6 and not victim.queue  # whole pages of two requests
    victim.finish(requests[1])
    victim.safe_point()
    assert not victim.giving.owes
    assert before - victim.pages >= 8


def test_what_running_requests_will_write_is_kept_from_equals(victim: Victim) -> None:
    victim.run(PAGE_TOKENS, 6 * PAGE_TOKENS)
    victim.run(PAGE_TOKENS, 6 * PAGE_TOKENS)
    asker = neighbour(victim.elastic.ledger, floor=0)
    asker.post_targets(10, 60.0)
    victim.safe_point()
    free = victim.elastic.allocator.available_size()
    assert free >= 2 * 6 * PAGE_TOKENS
    assert victim.giving.owes and victim.pages < NUM_PAGES


def test_a_right_sends_the_youngest_back_and_admits_nobody_meanwhile(victim: Victim) -> None:
    requests = [victim.run(4 * PAGE_TOKENS, 0) for _ in range(5)]
    asker = neighbour(victim.elastic.ledger, floor=8)
    ask_in_vain(asker, 8)
    victim.safe_point()
    assert victim.queue == [requests[4], requests[3]]
    assert victim.pages <= NUM_PAGES + 1 - 8 and victim.elastic.owner.target() is None
    # Their last pass may be in flight: admitted in this turn, its token would be in their answers twice.
    assert victim.giving.owes
    victim.safe_point()
    assert not victim.giving.owes and len(victim.queue) == 2


def test_requests_that_are_not_merged_yet_are_waited_for(victim: Victim) -> None:
    """SGLang merges a prefill's batch only in its next turn: the pages of both would stay, whatever is sent back."""
    requests = [victim.run(4 * PAGE_TOKENS, 0) for _ in range(5)]
    victim.last = Batch(victim.elastic, [requests.pop() for _ in range(2)], extend=True)
    victim.running.reqs = requests
    asker = neighbour(victim.elastic.ledger, floor=8)
    ask_in_vain(asker, 8)
    victim.safe_point()
    assert victim.giving.owes and not victim.queue
    victim.running.reqs += victim.last.reqs
    victim.last = victim.running
    victim.safe_point()
    assert len(victim.queue) == 2 and victim.elastic.owner.target() is None


def test_who_owes_admits_again_once_nobody_asks(victim: Victim) -> None:
    for _ in range(5):
        victim.run(4 * PAGE_TOKENS, 0)
    asker = neighbour(victim.elastic.ledger, floor=0)
    asker.post_targets(8, 60.0)
    victim.safe_point()
    victim.running.batch_is_full = True
    assert victim.giving.owes
    asker.set_activity(True, 0, 2)
    victim.safe_point()
    assert not victim.giving.owes and not victim.running.batch_is_full
    assert victim.elastic.owner.target() is None


def test_an_idle_victim_gives_its_cache(victim: Victim) -> None:
    victim.elastic.cache(list(range(1200)))
    victim.elastic.owner.set_activity(False, 0, 2)
    asker = neighbour(victim.elastic.ledger, floor=0)
    asker.post_targets(NUM_PAGES, 60.0)
    victim.safe_point()
    assert victim.pages == 1 and not victim.giving.owes


def count_looks(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each look at what is used on which page."""
    looks: list[int] = []
    really_look = victim.elastic.allocator.used_per_page

    def look(free: Any) -> Any:
        looks.append(1)
        return really_look(free)

    monkeypatch.setattr(victim.elastic.allocator, "used_per_page", look)
    return looks


def test_many_are_sent_back_with_few_looks_at_the_device(
    victim: Victim, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [victim.run(PAGE_TOKENS, 0) for _ in range(NUM_PAGES)]
    looks = count_looks(victim, monkeypatch)
    ask_in_vain(neighbour(victim.elastic.ledger, floor=12), 12)
    victim.safe_point()
    assert victim.elastic.owner.target() is None and 11 <= len(victim.queue) < NUM_PAGES
    assert victim.queue == requests[::-1][: len(victim.queue)]
    assert len(looks) <= 4, "one to see what is free, one for what they held, and for ends of pages"


@pytest.mark.parametrize(("looked_ahead", "expected"), [(False, ["cpu", "numpy"]), (True, [])])
def test_choosing_waits_for_the_device_once_or_has_done_so(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, looked_ahead: bool, expected: list[str]
) -> None:
    """Beside a busy neighbour on the card each wait takes milliseconds."""
    victim.elastic.cache(list(range(1200)))
    if looked_ahead:
        victim.giving.look_ahead()
    asker = neighbour(victim.elastic.ledger, floor=0)
    victim.elastic.owner.set_activity(False, 0, 2)
    asker.post_targets(8, 60.0)
    waits: list[str] = []
    for name in ("cpu", "item", "tolist", "nonzero", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: Any, *args: Any, name: str = name, original: Any = original) -> Any:
            waits.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for name in ("bincount", "unique", "nonzero"):
        monkeypatch.delattr(torch, name)

    def stop(pages: object, let_go: object) -> int:
        raise InterruptedError

    monkeypatch.setattr(victim.elastic.allocator, "drop_pages", stop)
    with pytest.raises(InterruptedError):
        victim.safe_point()
    assert waits == expected


def split_the_prompt(victim: Victim) -> None:
    """Another prompt with the same beginning was looked for: two nodes where one was."""
    victim.elastic.cached([*range(100), 7777])


def cache_another(victim: Victim) -> None:
    victim.elastic.cache([5000 + n for n in range(200)])


def hold_it(victim: Victim) -> None:
    found = victim.elastic.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", range(600)))))
    victim.elastic.tree.inc_lock_ref(found.last_device_node)


def change_nothing(victim: Victim) -> None:
    pass


@pytest.mark.parametrize("change", [split_the_prompt, cache_another, hold_it, change_nothing])
def test_what_was_seen_ahead_counts_only_while_nothing_has_changed(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, change: Callable[[Victim], None]
) -> None:
    victim.elastic.cache(list(range(600)))
    victim.giving.look_ahead()
    looks = count_looks(victim, monkeypatch)
    change(victim)
    victim.elastic.owner.set_activity(False, 0, 2)
    asker = neighbour(victim.elastic.ledger, floor=0)
    asker.post_targets(NUM_PAGES, 60.0)
    victim.safe_point()
    assert len(looks) == (change is not change_nothing)
    # What is held: 600 tokens of 64 a page, with the padding one before them. The padding one's page stays always.
    assert victim.pages == (10 if change is hold_it else 1)


def test_what_was_seen_ahead_can_be_forgotten(victim: Victim) -> None:
    slots = victim.elastic.cache(list(range(600)))
    held = weakref.ref(victim.elastic.tree.root_node.children.copy().popitem()[1])
    del slots
    victim.giving.look_ahead()
    victim.elastic.tree.reset()
    victim.giving.forget()
    gc.collect()
    assert held() is None
