"""The ledger under several real processes, of which some are stopped at a named crash point and then killed.

Whatever is killed wherever: leases never exceed the budget, the survivors go on, and what the dead held comes
back exactly once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from prism_sgl.allocator.crash_points import NAMES
from prism_sgl.allocator.ledger import Ledger
from property_tests.ledger_process import GRANULE_BYTES, LedgerProcess

BUDGET = 24
MAX_OWNERS = 4
# Commands that may pass each point.
PASSES = {
    "in_lock": [
        ("grow", "num_pages"),
        ("shrink", "num_pages"),
        ("reserve", "granules"),
        ("release", "granules"),
    ],
    "between_reserve_and_map": [("grow", "num_pages")],
    "between_unmap_and_return": [("shrink", "num_pages")],
    "while_posting_target": [("post", "granules")],
}
HOLD_THE_LOCK = {"in_lock", "while_posting_target"}
amounts = st.integers(1, 10)

_idle: list[LedgerProcess] = []  # started once, used by one example after the other


@pytest.fixture(scope="module", autouse=True)
def _end_processes() -> Iterator[None]:
    yield
    while _idle:
        _idle.pop().kill()


@dataclass
class Member:
    """An owner, and what the model thinks that it holds."""

    name: str
    process: LedgerProcess
    kv: int = 0
    weights: int = 0
    is_open: bool = False
    is_asleep: bool = False
    asked: bool = False

    @property
    def held(self) -> int:
        return self.kv + self.weights


class LedgerMachine(RuleBasedStateMachine):
    members = Bundle("members")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self.folder.name) / "ledger")
        self.ledger = Ledger.create(self.path, BUDGET * GRANULE_BYTES, "host0")
        self.living: list[Member] = []
        self.returning = 0
        self.joined = 0

    def teardown(self) -> None:
        for member in self.living:
            assert member.process.ask(do="leave")
            _idle.append(member.process)
        self.ledger.reap(None)
        assert self.ledger.totals().free == BUDGET
        assert self.ledger.owners() == []
        self.ledger.close()
        self.folder.cleanup()

    @property
    def free(self) -> int:
        return BUDGET - self.returning - sum(member.held for member in self.living)

    @rule(target=members, floor=st.integers(0, BUDGET // MAX_OWNERS))
    def join(self, floor: int) -> Member | None:
        if len(self.living) == MAX_OWNERS:
            return self.living[0]
        self.joined += 1
        member = Member(f"model{self.joined}", _idle.pop() if _idle else LedgerProcess())
        assert member.process.ask(do="join", path=self.path, name=member.name, floor=floor, ceiling=BUDGET)
        self.living.append(member)
        return member

    @rule(member=members, num_pages=amounts)
    def grow(self, member: Member, num_pages: int) -> None:
        if member not in self.living:
            return
        free, total = self.free, num_pages + (not member.is_open)
        grown = member.process.ask(do="grow", num_pages=num_pages)
        kv = member.process.ask(do="held")["kv"]
        opened = int(not member.is_open and kv > 0)
        assert kv == member.kv + (total if grown else opened)
        if not grown:  # no room, no pages left in the arena, or it waits for one who asked before
            waits = any(other.asked for other in self.living if other is not member)
            assert total > free or member.kv + total > 16 or waits or member.is_asleep
        member.kv, member.is_open = kv, kv > 0

    @rule(member=members, num_pages=amounts)
    def shrink(self, member: Member, num_pages: int) -> None:
        if member in self.living:
            given = member.process.ask(do="shrink", num_pages=num_pages)
            assert given == min(num_pages, max(0, member.kv - 1))
            member.kv -= given

    @rule(member=members, granules=amounts)
    def reserve(self, member: Member, granules: int) -> None:
        if member in self.living:
            assert member.process.ask(do="reserve", granules=granules) is (granules <= self.free)
            member.weights += granules if granules <= self.free else 0

    @rule(member=members, granules=amounts)
    def release(self, member: Member, granules: int) -> None:
        if member in self.living:
            member.weights -= member.process.ask(do="release", granules=granules)

    @rule(member=members, granules=amounts)
    def post(self, member: Member, granules: int) -> None:
        if member in self.living:
            posted = member.process.ask(do="post", granules=granules)
            assert sum(amount for _, amount in posted) <= granules
            others = {other.name: other for other in self.living if other is not member}
            assert {name for name, _ in posted} <= others.keys()
            for name, amount in posted:
                other = others[name]
                assert amount <= (other.weights if other.is_asleep else other.kv)
            member.asked = True

    @rule(member=members)
    def answer(self, member: Member) -> None:
        if member in self.living:
            view = next(view for view in self.ledger.owners() if view.name == member.name)
            given = member.process.ask(do="answer")
            if member.is_asleep:
                member.weights -= given
                assert not given or (view.target and member.weights == view.target.granules)
            else:
                member.kv -= given
                assert not given or member.kv >= view.floor

    @rule(member=members)
    def sleep(self, member: Member) -> None:
        if member in self.living and not member.is_asleep:
            assert member.process.ask(do="sleep")
            member.kv, member.is_open, member.is_asleep = 0, False, True

    @rule(member=members, granules=st.integers(0, 10))
    def wake(self, member: Member, granules: int) -> None:
        if member in self.living and member.is_asleep:
            assert member.process.ask(do="wake", granules=granules) is (granules <= self.free)
            if granules <= self.free:
                member.weights += granules
                member.is_asleep = False

    @rule(member=consumes(members), data=st.data(), point=st.sampled_from(NAMES), amount=amounts)
    def crash(self, member: Member, data: st.DataObject, point: str, amount: int) -> None:
        if member not in self.living:
            return
        verb, parameter = data.draw(st.sampled_from(PASSES[point]))
        process = member.process
        assert process.ask(do="arm", name=point)
        reply = process.ask(do=verb, **{parameter: amount})
        stopped = reply == {"stopped": point}
        kv = weights = 0
        if not stopped:  # it did not pass there; killed idle then
            held = process.ask(do="held")
            kv, weights = held["kv"], held["weights"]
        self.living.remove(member)
        self._survivors_go_on(process, blocked=stopped and point in HOLD_THE_LOCK)
        (dead,) = [view for view in self.ledger.owners() if view.name == member.name]
        assert not dead.alive
        if stopped:
            kv, weights = member.kv, member.weights  # nothing has been returned or taken yet, but:
            if point == "between_reserve_and_map":
                kv += amount if member.is_open else 1
            elif verb == "grow" and not member.is_open:
                assert dead.kv == kv
            elif verb == "shrink" and point == "in_lock":
                assert dead.kv == kv  # its pages are unmapped already; the lease ends only now
        assert (dead.kv, dead.weights) == (kv, weights)
        self.returning += dead.held

    def _survivors_go_on(self, process: LedgerProcess, *, blocked: bool) -> None:
        """Each has a command under way when the process dies; with the lock held they wait for its death."""
        for other in self.living:
            other.process.send(do="reserve", granules=0)
        if not blocked:
            assert all(other.process.receive() is True for other in self.living)
        process.kill()
        if blocked:
            assert all(other.process.receive() is True for other in self.living)

    @rule()
    def reap(self) -> None:
        assert self.ledger.reap(None) == self.returning
        assert self.ledger.reap(None) == 0
        self.returning = 0

    @rule(device_free=st.integers(0, BUDGET))
    def reap_what_the_device_shows(self, device_free: int) -> None:
        returned = self.ledger.reap(device_free)
        self.returning -= returned
        assert not returned or self.free <= device_free

    @invariant()
    def agrees(self) -> None:
        self.ledger.check()
        totals = self.ledger.totals()
        assert totals.leased + totals.returning + totals.free == BUDGET
        assert (totals.leased, totals.returning) == (BUDGET - self.free - self.returning, self.returning)
        assert totals.free >= 0
        views = {view.name: view for view in self.ledger.owners() if view.alive}
        for member in self.living:
            held: Any = member.process.ask(do="held")
            assert views[member.name].is_asleep is member.is_asleep
            assert views[member.name].elastic == (member.weights if member.is_asleep else member.kv)
            assert held == {"kv": member.kv, "weights": member.weights, "physical": member.kv}


TestLedgerProcesses = LedgerMachine.TestCase
TestLedgerProcesses.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True
)
