"""Sleeping and waking when the device fails in the middle or has no memory, without an engine around them."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism_sgl.allocator.image import Image
from prism_sgl.allocator.ledger import Kind
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.allocator.weights import WeightsArena
from prism_sgl.engine import sleep_wake
from prism_sgl.engine.control import BUSY, SHORTAGE
from prism_sgl.engine.runtime_memory import RuntimeMemory, ShortageError
from prism_sgl.engine.sleep_wake import BusyError, prism_sleep, prism_wake
from prism_sgl.engine.strangers import Strangers
from prism_sgl.errors import VmmError
from prism_sgl.messages import RuntimeState
from tests.allocator.failing_calls import FailingCalls
from tests.engine.elastic_fixture import PAGE, Elastic, make_elastic

WEIGHT_PAGES = 4
BUDGET = 60


class Memory(SimpleNamespace):
    """What a RuntimeMemory holds, made by hand; it waits and asks as the real one does."""

    insist = RuntimeMemory.insist
    device_shortages = RuntimeMemory.device_shortages
    who_is_in_the_way = RuntimeMemory.who_is_in_the_way


class Sleeper:
    """A complete engine's memory, its KV and weights on real arenas whose system calls may fail."""

    def __init__(self, elastic: Elastic) -> None:
        self.elastic, self.owner = elastic, elastic.owner
        self.calls = FailingCalls()
        elastic.pool.vmm._calls = self.calls  # type: ignore[attr-defined]
        image = Image.create("unit", WEIGHT_PAGES * PAGE)
        image.seal()
        self.weights = WeightsArena(HostArena("unit:w", WEIGHT_PAGES, PAGE, self.calls), self.owner, image)
        assert self.weights.wake()
        self.settled: list[int] = []
        self.activations_fit = True
        self.done: list[str] = []  # of what keeps memory of torch's
        self.point = SimpleNamespace(
            asleep=False,
            allocator=elastic.allocator,
            grow=self._grow,
            giving=SimpleNamespace(forget=lambda: self.done.append("forget")),
        )
        self.memory = Memory(
            owner=self.owner,
            spec=SimpleNamespace(device="gpu0"),
            weights=self.weights,
            kv=elastic.pool,
            arrival=SimpleNamespace(begin=lambda: None, wait=lambda: None),
            safe_point=self.point,
            device=SimpleNamespace(synchronize=lambda: None, trim=lambda: self.done.append("trim")),
            overhead=SimpleNamespace(settle=self._settle, cap=lambda: None),
            bell=SimpleNamespace(wait=lambda seconds: None),
            strangers=Strangers("gpu0", elastic.ledger, lambda: None),
            ask_neighbours=lambda wanted: None,
            pages_bytes=lambda: 0,
        )
        self.scheduler = SimpleNamespace(
            is_fully_idle=lambda: True,
            flush_cache=lambda empty_cache: elastic.allocator.clear(),
            server_args=SimpleNamespace(chunked_prefill_size=64),
            model_config=SimpleNamespace(hf_text_config=object(), hidden_size=8, vocab_size=16),
            max_req_len=64,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def _settle(self, allowance_bytes: int, timeout_s: float) -> bool:
        self.settled.append(allowance_bytes)
        return self.activations_fit or allowance_bytes == 0

    def _grow(self, tokens: int) -> int:
        self.elastic.allocator.add_blocks(self.elastic.pool.grow_up_to(1))
        return tokens

    def break_call(self, number: int) -> None:
        self.calls.errno, self.calls.fail_after = errno.EIO, number

    def revive(self) -> None:
        """Awake with all its memory, as if nothing had failed."""
        self.calls.repair()
        self.point.asleep = False
        if not self.elastic.pool.is_open:
            assert self.elastic.allocator.reopen()
        self.elastic.pool.grow_up_to(20)
        self.elastic.allocator.clear()
        assert self.weights.wake()

    def insist_consistent(self) -> None:
        """No free slot on a page that is gone, and the books true."""
        self.elastic.allocator.check()
        self.weights.check()
        self.elastic.ledger.check()


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleeper]:
    elastic = make_elastic(
        tmp_path, token_bytes=32 * 1024, num_tokens=1600, block_tokens=1, budget_pages=BUDGET
    )
    elastic.owner.set_state(RuntimeState.AWAKE)
    elastic.grow(20)  # more than are given back in one step
    made = Sleeper(elastic)
    monkeypatch.setattr(RuntimeMemory, "current", lambda: made.memory)
    yield made
    made.calls.repair()
    elastic.ledger.close()


def test_sleep_and_wake(sleeper: Sleeper) -> None:
    prism_sleep(sleeper.scheduler, keep_weights=False)
    assert sleeper.owner.held(Kind.WEIGHTS) == sleeper.owner.held(Kind.KV) == 0
    assert sleeper.owner.view.state is RuntimeState.ASLEEP
    assert sleeper.done == ["forget", "trim"], "what was seen ahead keeps blocks of torch's from being freed"
    prism_wake(sleeper.scheduler, timeout_s=1.0, wait=True)
    assert sleeper.owner.held(Kind.WEIGHTS) == WEIGHT_PAGES
    assert sleeper.owner.view.state is RuntimeState.AWAKE
    sleeper.insist_consistent()


def test_a_driver_error_in_a_sleep_leaves_nothing_to_admit_to(sleeper: Sleeper) -> None:
    """At each call that it makes: the worker then ends the engine, and until that nobody gets a page that is gone."""
    for number in range(100):
        sleeper.break_call(number)
        try:
            prism_sleep(sleeper.scheduler, keep_weights=False)
        except VmmError:
            assert sleeper.point.asleep, "requests would be admitted"
            sleeper.insist_consistent()
            sleeper.revive()
        else:
            break
    assert number >= 8, "each of its calls has failed once"


def test_a_driver_error_in_a_wake_keeps_the_books_true(sleeper: Sleeper) -> None:
    for number in range(100):
        prism_sleep(sleeper.scheduler, keep_weights=False)
        sleeper.break_call(number)
        try:
            prism_wake(sleeper.scheduler, timeout_s=1.0, wait=True)
        except VmmError:
            assert sleeper.owner.view.state is not RuntimeState.AWAKE
            sleeper.insist_consistent()
            sleeper.revive()
        else:
            break
    assert number > 3, "each of its calls has failed once"


def test_a_busy_engine_does_not_sleep_and_says_so_in_its_first_word(sleeper: Sleeper) -> None:
    sleeper.scheduler.is_fully_idle = lambda: False
    with pytest.raises(BusyError, match=f"^{BUSY}"):
        prism_sleep(sleeper.scheduler, keep_weights=False)
    assert not sleeper.point.asleep
    assert sleeper.owner.view.state is RuntimeState.AWAKE


def test_what_could_not_be_set_aside_keeps_the_engine_awake(
    sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sleep_wake, "_set_aside", lambda scheduler: None)
    sleeper.scheduler.is_fully_idle = lambda: False
    held = sleeper.elastic.allocator.alloc(4)
    with pytest.raises(BusyError, match=f"^{BUSY}4 blocks of KV are in use"):
        prism_sleep(sleeper.scheduler, keep_weights=False, preempt=True)
    assert not sleeper.point.asleep
    sleeper.elastic.allocator.free(held)
    prism_sleep(sleeper.scheduler, keep_weights=False, preempt=True)
    assert sleeper.owner.view.state is RuntimeState.ASLEEP


@pytest.mark.parametrize("lacks", ["weights", "activations", "KV"])
def test_a_wake_without_room_sleeps_on(sleeper: Sleeper, lacks: str) -> None:
    """What has come of the weights stays, for the next try or for neighbours; nothing else is held."""
    prism_sleep(sleeper.scheduler, keep_weights=False)
    neighbour = sleeper.elastic.ledger.join("other", floor=0, ceiling=BUDGET, priority=0, bell="")
    left = {"weights": WEIGHT_PAGES - 1, "activations": BUDGET, "KV": WEIGHT_PAGES}[lacks]
    assert neighbour.try_reserve(Kind.KV, BUDGET - left)
    sleeper.activations_fit = lacks != "activations"
    with pytest.raises(ShortageError, match=f"^{SHORTAGE}no room for .*{lacks}"):
        prism_wake(sleeper.scheduler, timeout_s=0.0, wait=False)
    assert sleeper.point.asleep
    assert sleeper.owner.view.state is RuntimeState.ASLEEP
    assert sleeper.owner.held(Kind.KV) == 0
    assert sleeper.owner.held(Kind.WEIGHTS) == (0 if lacks == "weights" else WEIGHT_PAGES)
    if lacks == "KV":
        assert sleeper.settled[-1] == 0, "the room for activations is given back"
    neighbour.release(Kind.KV, BUDGET - left)
    sleeper.activations_fit = True
    prism_wake(sleeper.scheduler, timeout_s=1.0, wait=True)
    assert sleeper.owner.view.state is RuntimeState.AWAKE
    sleeper.insist_consistent()


def test_a_stranger_at_the_wake_is_named_once(
    sleeper: Sleeper, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And tried less and less often: each try maps what there is, gives it back, and the driver clears it."""
    pauses: list[float] = []
    clock = SimpleNamespace(
        sleep=pauses.append, monotonic=time.monotonic
    )  # of that module only: threads sleep too
    monkeypatch.setattr("prism_sgl.engine.runtime_memory.time", clock)
    prism_sleep(sleeper.scheduler, keep_weights=False)
    sleeper.calls.broken, sleeper.calls.errno = {"allocate"}, errno.ENOSPC
    for _ in range(2):
        with pytest.raises(ShortageError, match="another process holds the device's memory"):
            prism_wake(sleeper.scheduler, timeout_s=0.05, wait=False)
    assert pauses[:5] == [0.05, 0.1, 0.2, 0.4, 0.5]
    assert max(pauses) == 0.5
    assert caplog.text.count("another process holds it; requests wait") == 1
    sleeper.calls.repair()
    prism_wake(sleeper.scheduler, timeout_s=1.0, wait=True)
    assert sleeper.owner.view.state is RuntimeState.AWAKE
