"""Growing at safe points: what is asked for, and what is said while a stranger holds the device's memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_sgl.allocator.ledger import Kind
from prism_sgl.allocator.vmm import DeviceFullError, num_pages_in
from prism_sgl.engine import safe_point
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.engine.safe_point import SafePoint
from prism_sgl.engine.strangers import Strangers
from prism_sgl.messages import RuntimeState
from prism_sgl.units import GRANULE_BYTES
from tests.engine.elastic_fixture import Elastic, make_elastic

PAGE_TOKENS = 64
NUM_PAGES = 20


class Memory(SimpleNamespace):
    """What a RuntimeMemory holds, made by hand; it waits and counts as the real one does."""

    insist = RuntimeMemory.insist
    device_shortages = RuntimeMemory.device_shortages


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
        memory = Memory(
            owner=elastic.owner,
            kv=elastic.pool,
            weights=None,
            spec=SimpleNamespace(device="gpu0"),
            bell=SimpleNamespace(drain=lambda: None, wait=lambda seconds: None),
            overhead=SimpleNamespace(look=lambda *, in_a_hurry: self.in_a_hurry.append(in_a_hurry)),
            arrival=None,
            ask_neighbours=lambda wanted, page=1: self.asked.append(wanted),
            ledger=elastic.ledger,
            strangers=Strangers("gpu0", elastic.ledger, self._free_granules),
        )
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=elastic.allocator,
            tree_cache=elastic.tree,
            enable_overlap=False,
            chunked_req=None,
            waiting_queue=[],
            max_running_requests=8,
        )
        self.point = SafePoint(self.scheduler, memory)  # type: ignore[arg-type]

    def _free_granules(self) -> int:
        return self.room * self.elastic.pool.pages.page_bytes // GRANULE_BYTES

    def wait_for(self, pages: int) -> None:
        """A request that needs so many pages waits."""
        sampling = SimpleNamespace(max_new_tokens=8)
        prompt = range((pages - 1) * PAGE_TOKENS)
        self.scheduler.waiting_queue = [
            SimpleNamespace(origin_input_ids=prompt, output_ids=[], sampling_params=sampling)
        ]

    def turn(self, last_batch: object = None, *, batch: object = "a batch", running: int = 0) -> None:
        """``running``: requests that decode."""
        self.point._tried_at = 0.0  # as if the pause between two tries were over
        self.point.memory.strangers._asked_at = 0.0
        request = SimpleNamespace(output_ids=[], sampling_params=SimpleNamespace(max_new_tokens=8))
        decoding = SimpleNamespace(
            reqs=[request] * running, batch_is_full=False, is_empty=lambda: not running
        )
        plan = SimpleNamespace(batch_to_run=batch)
        self.point.next_batch(lambda scheduler, running_batch, last_batch: plan, decoding, last_batch)


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


@pytest.mark.parametrize("gone", [False, True], ids=["who stays", "who comes back"])
def test_a_stranger_is_news_again_only_if_it_was_gone(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, gone: bool
) -> None:
    """Whether anybody waits meanwhile, and gets what he wants, or not."""
    caplog.set_level(logging.INFO)
    runtime.wait_for(12)
    runtime.room = 0
    runtime.turn()
    runtime.wait_for(2)  # the others have been served in turn
    runtime.room = 4
    runtime.turn()
    runtime.turn()
    runtime.scheduler.waiting_queue = []
    runtime.room = NUM_PAGES if gone else 1
    runtime.turn()
    runtime.turn()
    runtime.room = 1
    runtime.wait_for(12)
    runtime.turn()
    assert caplog.text.count("another process holds it") == 1 + gone
    assert caplog.text.count("has memory for waiting requests again") == gone


def test_only_the_device_makes_a_stranger(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """Neighbours that hold the rest of the budget are none, also after one was there, and are not waited for as one."""
    caplog.set_level(logging.INFO)
    runtime.wait_for(4)
    runtime.room = 0
    runtime.turn()
    runtime.room = NUM_PAGES
    runtime.turn()
    runtime.turn()
    assert [text.rpartition(" ")[2] for text in caplog.messages] == ["[[devices]]", "again"]
    neighbour = runtime.elastic.ledger.join("other", floor=0, ceiling=NUM_PAGES, priority=0, bell="")
    assert neighbour.reserve_up_to(Kind.KV, NUM_PAGES)
    runtime.wait_for(12)
    runtime.turn()
    assert not runtime.point._device_was_short
    assert runtime.point.memory.insist(lambda: None, GRANULE_BYTES, 0.0) is None
    assert not runtime.point.memory.device_is_short
    assert len(caplog.messages) == 2


def test_strangers_are_gone_when_the_driver_says_so_twice(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked now and then only, whatever happens in between, and a shortage begins the count again."""
    caplog.set_level(logging.INFO)
    free = runtime.elastic.ledger.totals().free
    card = SimpleNamespace(now=0.0, shown=0, asked=[])
    monkeypatch.setattr("prism_sgl.engine.strangers.time", SimpleNamespace(monotonic=lambda: card.now))

    def shown() -> int:
        card.asked.append(card.now)
        return int(card.shown)

    strangers = Strangers("gpu0", runtime.elastic.ledger, shown)
    for card.now, short, card.shown in (
        (100.0, True, 0),
        (100.1, False, free),  # too soon after a shortage to be asked
        (100.6, False, free),
        (100.7, True, free),
        (101.3, False, free),
        (101.4, False, free),
        (101.9, False, free - 1),
        (102.5, False, free),
    ):
        strangers.look(short)
    assert card.asked == [100.6, 101.3, 101.9, 102.5]
    assert len(caplog.messages) == 1
    card.now = 103.1
    strangers.look(False)
    strangers.look(False)
    assert [text.rpartition(" ")[2] for text in caplog.messages] == ["[[devices]]", "again"]


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


def test_who_has_just_been_prefilled_is_at_work(runtime: Runtime) -> None:
    """SGLang adds them to those that decode only in this turn; an idle owner gives all that it has."""
    sampling = SimpleNamespace(max_new_tokens=4 * PAGE_TOKENS)
    request = SimpleNamespace(output_ids=[], sampling_params=sampling, finished=lambda: True)
    prefilled = SimpleNamespace(
        reqs=[request], forward_mode=SimpleNamespace(is_extend=lambda: True), is_empty=lambda: False
    )
    runtime.turn(prefilled)
    assert not runtime.elastic.owner.view.busy  # without overlap its one token may have been all
    request.finished = lambda: False
    runtime.turn(prefilled)
    assert runtime.elastic.owner.view.busy
    assert runtime.elastic.allocator.usable_tokens() >= 4 * PAGE_TOKENS  # its answer is foreseen


def test_nobody_is_admitted_while_neighbours_are_owed_even_where_requests_have_priorities(
    runtime: Runtime,
) -> None:
    """SGLang then looks at the queue whatever ``batch_is_full`` says; a prefill that is half done goes on."""
    seen: list[list[object]] = []
    scheduler, running = runtime.scheduler, SimpleNamespace(batch_is_full=False)

    def original(scheduler: SimpleNamespace, running_batch: SimpleNamespace) -> str:
        running_batch.batch_is_full = False
        seen.append(list(scheduler.waiting_queue))
        scheduler.waiting_queue.append("its grammar is ready")
        return "plan"

    scheduler.waiting_queue = ["waits"]
    runtime.point.giving.owes = True
    scheduler.enable_priority_preemption = False
    plan = runtime.point.new_prefill(
        lambda scheduler, running: (running.batch_is_full, scheduler.waiting_queue), running
    )
    assert plan == (True, ["waits"])
    scheduler.enable_priority_preemption = True
    assert runtime.point.new_prefill(original, running) == "plan"
    assert seen == [[]] and scheduler.waiting_queue == ["waits", "its grammar is ready"]
    runtime.point.giving.owes = False
    runtime.point.new_prefill(original, running)
    assert seen[1] == ["waits", "its grammar is ready"]


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


def test_what_neighbours_are_giving_is_taken_when_all_of_it_has_come(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To map beside their unmapping takes ten times as long."""
    ledger, owner, point = runtime.elastic.ledger, runtime.elastic.owner, runtime.point
    victim = ledger.join("victim", floor=0, ceiling=NUM_PAGES, priority=0, bell="")
    victim.set_state(RuntimeState.AWAKE)
    victim.set_activity(False, 0, 1)
    assert victim.try_reserve(Kind.KV, NUM_PAGES)
    monkeypatch.setattr(point.memory, "ask_neighbours", lambda wanted, page: owner.post_targets(wanted, 60.0))
    monkeypatch.setattr(safe_point, "_COMES_WITHIN_S", 60.0)
    runtime.wait_for(9)
    runtime.turn()
    assert owner.owed() == 8
    for _ in range(7):
        victim.release(Kind.KV, 1)
        runtime.turn()
        assert owner.held(Kind.KV) == 1
    victim.release(Kind.KV, 1)
    runtime.turn()
    assert owner.held(Kind.KV) == 9 and not owner.owed()
    runtime.wait_for(15)
    point._asked_at = -math.inf  # as if the pause between two asks were over
    runtime.turn()
    assert owner.owed() == 6
    victim.release(Kind.KV, 1)
    runtime.turn()
    assert owner.held(Kind.KV) == 9
    runtime.scheduler.max_running_requests = 32
    runtime.turn(running=17)
    assert owner.held(Kind.KV) == 9
    runtime.turn(running=18)  # 575 tokens are free, 594 may be written until all has come
    assert owner.held(Kind.KV) == 10, "requests that run would run out"
    victim.release(Kind.KV, 1)
    runtime.turn()
    assert owner.held(Kind.KV) == 10
    monkeypatch.setattr(safe_point, "_COMES_WITHIN_S", 0.0)
    runtime.turn()
    assert owner.held(Kind.KV) == 11, "a victim that takes long holds nobody up"


def test_an_idle_engine_prepares_to_be_asked_once_it_has_slept(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the first idle turn: then the next request of the same client may be on its way."""
    done: list[str] = []
    monkeypatch.setattr(runtime.point.giving, "look_ahead", lambda: done.append("look"))
    monkeypatch.setattr(runtime.point.giving, "forget", lambda: done.append("forget"))
    runtime.turn()
    runtime.turn(batch=None)
    assert done == ["forget"]
    runtime.turn(batch=None)
    assert done == ["forget", "look"]
    runtime.wait_for(2)
    runtime.turn(batch=None)
    assert done == ["forget", "look", "forget"]


def test_without_a_prefix_cache_whole_answers_are_foreseen(runtime: Runtime) -> None:
    """Of requests that ignore an answer's end; reserved less, such a one would be refused, and wait for ever."""
    tree = SimpleNamespace(disable=True, evictable_size=lambda: 0)
    runtime.scheduler.tree_cache = tree
    point = SafePoint(runtime.scheduler, runtime.point.memory)
    sampling = SimpleNamespace(max_new_tokens=8000, ignore_eos=True)
    request = SimpleNamespace(origin_input_ids=range(100), output_ids=[], sampling_params=sampling)
    assert point._running_tokens([request]) > 8000
    sampling.ignore_eos = False
    assert point._running_tokens([request]) < 8000
    assert 4096 < runtime.point._running_tokens([request]) < 8000
