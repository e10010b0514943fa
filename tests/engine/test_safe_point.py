"""Growing at safe points: what is asked for, and what is said while a stranger holds the device's memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_sgl.allocator.ledger import Kind
from prism_sgl.allocator.vmm import DeviceFullError, num_pages_in
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.engine.safe_point import SafePoint
from prism_sgl.engine.strangers import Strangers
from prism_sgl.messages import RuntimeState
from tests.engine.elastic_fixture import Elastic, make_elastic

PAGE_TOKENS = 64
NUM_PAGES = 20


class Runtime:
    """A safe point over a real pool; the scheduler around it is an empty one with a queue."""

    def __init__(self, elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
        self.elastic = elastic
        self.room = NUM_PAGES  # pages that the device still has, whatever the ledger says
        self.asked: list[int] = []
        self.in_a_hurry: list[bool] = []  # at each look at torch's memory
        really_map = elastic.pool.vmm.map

        def map_if_there_is_room(runs: Sequence[range]) -> None:
            if num_pages_in(runs) > self.room:
                raise DeviceFullError("full")
            self.room -= num_pages_in(runs)
            really_map(runs)

        monkeypatch.setattr(elastic.pool.vmm, "map", map_if_there_is_room)
        memory = SimpleNamespace(
            owner=elastic.owner,
            spec=SimpleNamespace(device="gpu0"),
            bell=SimpleNamespace(drain=lambda: None, wait=lambda seconds: None),
            overhead=SimpleNamespace(look=lambda *, in_a_hurry: self.in_a_hurry.append(in_a_hurry)),
            arrival=None,
            ask_neighbours=self.asked.append,
            strangers=Strangers("gpu0"),
            device_is_short=False,
        )
        memory.insist = partial(RuntimeMemory.insist, memory)
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=elastic.allocator,
            tree_cache=elastic.tree,
            enable_overlap=False,
            chunked_req=None,
            waiting_queue=[],
            max_running_requests=8,
        )
        self.point = SafePoint(self.scheduler, memory)  # type: ignore[arg-type]

    def wait_for(self, pages: int) -> None:
        """A request that needs so many pages waits."""
        sampling = SimpleNamespace(max_new_tokens=8)
        prompt = range((pages - 1) * PAGE_TOKENS)
        self.scheduler.waiting_queue = [
            SimpleNamespace(origin_input_ids=prompt, output_ids=[], sampling_params=sampling)
        ]

    def turn(self, last_batch: object = None) -> None:
        self.point._tried_at = 0.0  # as if the pause between two tries were over
        running = SimpleNamespace(reqs=[], batch_is_full=False, is_empty=lambda: True)
        plan = SimpleNamespace(batch_to_run=object())
        self.point.next_batch(lambda scheduler, running_batch, last_batch: plan, running, last_batch)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    elastic = make_elastic(
        tmp_path, token_bytes=32 * 1024, num_tokens=1600, block_tokens=1, budget_pages=NUM_PAGES + 1
    )
    elastic.owner.set_state(RuntimeState.AWAKE)
    yield Runtime(elastic, monkeypatch)
    elastic.ledger.close()


def test_a_stranger_is_told_of_once_and_so_is_its_end(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runtime.wait_for(24)  # more than the budget ever has
    for room in (0, 0, 1, 0, 1, 0):  # single pages that come free are not the end of it
        runtime.room = room
        runtime.turn()
    assert len(caplog.records) == 1 and "another process holds it" in caplog.text
    runtime.room = NUM_PAGES
    runtime.turn()
    runtime.turn()
    assert [record.message for record in caplog.records][1:] == ["gpu0 has memory for waiting requests again"]


def test_nobody_waits_any_more_so_the_next_stranger_is_news(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.wait_for(12)
    runtime.room = 0
    runtime.turn()
    runtime.scheduler.waiting_queue = []
    runtime.turn()
    runtime.wait_for(12)
    runtime.turn()
    assert caplog.text.count("another process holds it") == 2


def test_who_waits_asks_for_what_is_still_missing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not again for all: a victim would give twice."""
    monkeypatch.setattr("prism_sgl.engine.runtime_memory.TARGET_DEADLINE_S", -1.0)  # asks at every look
    neighbour = runtime.elastic.ledger.join("other", floor=0, ceiling=NUM_PAGES, priority=0, bell="")
    assert neighbour.try_reserve(Kind.KV, 16)
    given = iter((5, 4, 3))

    def give(_seconds: float) -> None:
        neighbour.release(Kind.KV, next(given))

    runtime.point.memory.bell.wait = give  # type: ignore[method-assign]
    assert runtime.point.ensure_usable(16 * PAGE_TOKENS - 1)
    assert runtime.asked == [11, 6, 2]


def test_no_first_token_waits_for_a_look_at_torchs_memory(runtime: Runtime) -> None:
    prefill, decode = (
        SimpleNamespace(
            forward_mode=SimpleNamespace(is_extend=lambda mode=mode: mode), reqs=[], is_empty=lambda: True
        )
        for mode in (True, False)
    )
    runtime.turn()
    runtime.wait_for(1)
    runtime.turn()
    runtime.scheduler.waiting_queue = []
    runtime.turn(prefill)
    runtime.turn(decode)
    assert runtime.in_a_hurry == [False, True, True, False]
