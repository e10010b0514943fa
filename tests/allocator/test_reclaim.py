from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prism_sgl.allocator import doorbell
from prism_sgl.allocator.ledger import Kind, Ledger, Owner, OwnerView, Target
from prism_sgl.allocator.ledger_views import NOT_ENFORCED
from prism_sgl.allocator.reclaim import Claim, choose_victims
from prism_sgl.messages import RuntimeState
from tests.allocator.conftest import join

NOW_NS = 1_000


def owner(
    slot: int,
    *,
    kv: int,
    weights: int = 0,
    floor: int = 0,
    busy: bool = True,
    priority: int = 0,
    share: int = 1000,
    idle_since_ns: int = 0,
    target: Target | None = None,
    state: RuntimeState = RuntimeState.AWAKE,
    alive: bool = True,
) -> OwnerView:
    return OwnerView(
        slot=slot,
        epoch=1,
        pid=slot + 1,
        name=f"model{slot}",
        bell="",
        alive=alive,
        state=state,
        priority=priority,
        share=share,
        weights=weights,
        kv=kv,
        overhead=0,
        floor=floor,
        ceiling=1000,
        busy=busy,
        wanted=0,
        idle_since_ns=idle_since_ns,
        target=target,
        answered_seq=0,
    )


def chosen(me: OwnerView, others: Sequence[OwnerView], granules: int) -> list[tuple[int, int]]:
    claims = choose_victims(me, [me, *others], granules, NOW_NS)
    return [(claim.victim.slot, claim.granules) for claim in claims]


HUNGRY = owner(0, kv=0, floor=10)  # below its floor
SATED = owner(0, kv=10, floor=10)


def test_idle_ones_first_then_low_priority_then_large_surplus() -> None:
    others = [
        owner(1, kv=5, priority=1),
        owner(2, kv=5),
        owner(3, kv=6),
        owner(4, kv=5, busy=False, idle_since_ns=20, priority=-5),
        owner(5, kv=5, busy=False, idle_since_ns=10, priority=5),
    ]
    assert chosen(HUNGRY, others, 100) == [(5, 5), (4, 5), (3, 6), (2, 5), (1, 5)]
    assert chosen(HUNGRY, others, 7) == [(5, 5), (4, 2)]
    assert chosen(HUNGRY, others, 0) == []
    assert chosen(HUNGRY, others, -3) == []


def test_nobody_is_asked_below_its_floor_or_for_the_same_granules_twice() -> None:
    pending = Target(granules=6, seq=1, deadline_ns=NOW_NS + 1, enforced=6)
    others = [
        owner(1, kv=10, floor=10),
        owner(2, kv=5, floor=10),
        owner(3, kv=10, floor=4, target=pending),
    ]
    assert chosen(HUNGRY, others, 100) == [(3, 2)]


def test_who_cannot_answer_is_not_asked() -> None:
    others = [
        owner(1, kv=5, alive=False),
        owner(2, kv=5, state=RuntimeState.STARTING),
        owner(3, kv=0, weights=5, state=RuntimeState.WAKING),
        owner(4, kv=5, target=Target(granules=4, seq=1, deadline_ns=NOW_NS, enforced=4)),  # slow already
        owner(5, kv=5, state=RuntimeState.DRAINING),
    ]
    assert chosen(HUNGRY, others, 100) == [(5, 5)]


def sleeper(slot: int, *, weights: int, floor: int = 0, **more: Any) -> OwnerView:
    return owner(slot, kv=0, weights=weights, floor=floor, state=RuntimeState.ASLEEP, **more)


def test_sleepers_are_asked_first_and_for_their_weights() -> None:
    idle = owner(1, kv=5, weights=50, busy=False, idle_since_ns=0, priority=-9)
    others = [
        idle,
        sleeper(2, weights=6, busy=False, idle_since_ns=20, priority=5, floor=3),
        sleeper(3, weights=4, busy=False, idle_since_ns=10),
        sleeper(4, weights=2, busy=True),  # has not said yet that it is idle
    ]
    assert chosen(HUNGRY, others, 100) == [(3, 4), (2, 6), (4, 2), (1, 5)]
    assert chosen(HUNGRY, others, 5) == [(3, 4), (2, 1)]
    # One above its floor may take them too, whatever their priority.
    assert chosen(SATED, others, 12) == [(3, 4), (2, 6), (4, 2)]


def test_a_sleeper_is_asked_for_all_it_holds_but_once() -> None:
    view = sleeper(1, weights=6, floor=4)
    assert (view.elastic, view.kept, view.surplus, view.reclaimable) == (6, 0, 6, 6)
    asked = sleeper(1, weights=6, target=Target(granules=2, seq=1, deadline_ns=NOW_NS + 1, enforced=2))
    assert asked.reclaimable == 2
    assert chosen(HUNGRY, [asked], 100) == [(1, 2)]
    assert chosen(HUNGRY, [sleeper(1, weights=0)], 100) == []
    awake = owner(1, kv=6, weights=50, floor=4)
    assert (awake.elastic, awake.kept, awake.surplus, awake.reclaimable) == (6, 4, 2, 2)


def test_one_above_its_floor_takes_from_the_idle_and_from_lower_priorities() -> None:
    others = [
        owner(1, kv=5, busy=False, priority=9),
        owner(2, kv=5, priority=-1),
        owner(3, kv=50, priority=1),
    ]
    assert chosen(SATED, others, 100) == [(1, 5), (2, 5)]


def test_equals_share_with_a_gap() -> None:
    me = owner(0, kv=20, floor=10)
    assert chosen(me, [owner(1, kv=31)], 100) == [(1, 10)]  # surplus 31 - 10 > 2 * 10
    assert chosen(me, [owner(1, kv=12)], 100) == []
    # Whoever has just been given to is not asked back: no ping-pong.
    after_me, after_other = owner(0, kv=30, floor=10), owner(1, kv=21)
    assert chosen(after_other, [after_me], 100) == []
    assert chosen(after_me, [after_other], 100) == []
    # What was promised to others already does not count as surplus any more.
    asked = owner(1, kv=31, target=Target(granules=13, seq=1, deadline_ns=NOW_NS + 1))
    assert chosen(me, [asked], 100) == [(1, 1)]


def test_only_who_lacks_its_floor_or_ranks_higher_may_send_requests_back() -> None:
    others = [owner(1, kv=200), owner(2, kv=20, priority=-1), owner(3, kv=5, busy=False, priority=9)]

    def rights(me: OwnerView) -> dict[int, bool]:
        claims = choose_victims(me, [me, *others], 50, NOW_NS)
        return {claim.victim.slot: claim.by_right for claim in claims}

    assert rights(HUNGRY) == {3: True, 2: True, 1: True}
    assert rights(SATED) == {3: False, 2: True, 1: False}


def test_a_right_goes_before_what_equals_were_promised() -> None:
    """After what nobody was promised, and also where that is overdue: its running requests need it, and may go back."""
    promised = Target(granules=4, seq=1, deadline_ns=NOW_NS + 1)
    others = [owner(1, kv=10, floor=2, target=promised), owner(2, kv=3)]
    assert chosen(HUNGRY, others, 4) == [(1, 2), (2, 2)]
    assert chosen(HUNGRY, others, 100) == [(1, 8), (2, 3)]
    assert chosen(SATED, others, 100) == [(2, 1)]
    overdue = owner(1, kv=10, floor=2, target=Target(granules=4, seq=1, deadline_ns=NOW_NS))
    assert chosen(HUNGRY, [overdue, owner(2, kv=3)], 4) == [(1, 1), (2, 3)]
    assert chosen(SATED, [overdue], 4) == []


def test_equals_take_whole_pages_or_nothing() -> None:
    """A victim gives whole pages: with one page more than I it would have one less than I, and ask it back."""

    def taken(mine: int, theirs: int) -> list[Claim]:
        me, victim = owner(0, kv=64 * mine), owner(1, kv=64 * theirs)
        return choose_victims(me, [me, victim], 640, NOW_NS, page=64)

    assert taken(3, 4) == []
    assert [claim.granules for claim in taken(3, 5)] == [64]
    assert [claim.granules for claim in taken(3, 8)] == [128]
    assert taken(4, 4) == []


def test_busy_owners_borrow_by_their_shares() -> None:
    victim = owner(1, kv=91)
    assert chosen(owner(0, kv=0, share=2000), [victim], 100) == [(1, 60)]  # 60 and 31: twice as much
    assert chosen(owner(0, kv=0, share=500), [victim], 100) == [(1, 30)]
    assert chosen(owner(0, kv=0), [owner(1, kv=91, share=2000)], 100) == [(1, 30)]
    # Who has most for its share gives first.
    assert [slot for slot, _ in chosen(SATED, [owner(1, kv=60), owner(2, kv=90, share=2000)], 1)] == [1]


def test_a_share_is_in_the_ledger(ledger: Ledger) -> None:
    ledger.join("large", floor=0, ceiling=100, priority=0, bell="", share=2.5)
    join(ledger, "small")
    assert sorted((view.name, view.share) for view in ledger.owners()) == [("large", 2500), ("small", 1000)]


# ---------------------------------------------------------------- in the ledger


def fill(ledger: Ledger) -> None:
    """Nothing is free any more, and what this takes cannot be asked for."""
    assert join(ledger, "rest").try_reserve(Kind.OVERHEAD, ledger.totals().free)


def test_who_waits_is_rung_when_something_comes_free(ledger: Ledger, tmp_path: Path) -> None:
    bell = doorbell.Doorbell(str(tmp_path / "bell"))
    victim, asker = join(ledger, "victim"), join(ledger, "asker", floor=20, bell=bell.path)
    assert victim.try_reserve(Kind.KV, 100)
    victim.release(Kind.KV, 1)
    assert not bell.drain()  # nobody had asked
    asker.post_targets(20, 60.0)
    for _ in range(2):  # each part is news: the first pages are mapped while others are unmapped
        victim.release(Kind.KV, 10)
        assert bell.wait(60)
    assert asker.try_reserve(Kind.KV, 20)
    victim.release(Kind.KV, 4)
    assert not bell.drain()  # it has what it asked for
    bell.close()


def test_a_target_is_posted_rung_and_answered(ledger: Ledger, tmp_path: Path) -> None:
    bell = doorbell.Doorbell(str(tmp_path / "bell"))
    victim = join(ledger, "victim", bell=bell.path)
    asker = join(ledger, "asker", floor=20)
    assert victim.try_reserve(Kind.KV, 100)
    assert victim.target() is None
    (posted,) = asker.post_targets(20, 60.0)
    assert (posted.name, posted.granules) == ("victim", 20)
    assert bell.wait(60)
    bell.close()
    target = victim.target()
    assert target == posted.target
    assert target is not None
    assert target.granules == 80
    assert not target.overdue(time.monotonic_ns())
    assert target.overdue(target.deadline_ns)
    victim.release(Kind.KV, 15)
    assert victim.target() == target
    victim.release(Kind.KV, 5)  # reached: answered by itself
    assert victim.target() is None


def test_a_victim_that_does_not_answer_in_time_is_named_until_it_does(ledger: Ledger) -> None:
    victim = join(ledger, "victim")
    asker = join(ledger, "asker", floor=90)
    assert victim.try_reserve(Kind.KV, 100)
    asker.post_targets(10, 60.0)
    assert asker.overdue_victims() == []
    asker.post_targets(20, 0.0)
    assert asker.overdue_victims() == ["victim"]
    victim.release(Kind.KV, 20)
    assert asker.overdue_victims() == []


def test_two_askers_add_up_and_one_that_asks_again_does_not(ledger: Ledger) -> None:
    victim = join(ledger, "victim", floor=10)
    first, second = join(ledger, "first", floor=90), join(ledger, "second", floor=90)
    assert victim.try_reserve(Kind.KV, 100)
    assert [p.target.granules for p in first.post_targets(20, 60.0)] == [80]
    assert [p.target.granules for p in second.post_targets(30, 60.0)] == [50]
    assert first.post_targets(20, 60.0) == []
    assert second.post_targets(30, 60.0) == []
    victim.release(Kind.KV, 10)
    assert first.try_reserve(Kind.KV, 10)
    assert first.post_targets(10, 60.0) == []  # the rest of its first ask is still coming
    assert [(p.granules, p.target.granules) for p in second.post_targets(100, 60.0)] == [(40, 10)]
    target = victim.target()
    assert target is not None
    assert target.granules == 10


def test_only_what_is_asked_by_right_is_enforced(ledger: Ledger) -> None:
    victim = join(ledger, "victim")
    equal = join(ledger, "equal")
    entitled = join(ledger, "entitled", floor=10)
    for busy in (victim, equal, entitled):
        busy.set_activity(True, 0, 1)
    assert victim.try_reserve(Kind.KV, 60)
    fill(ledger)
    equal.post_targets(20, 60.0)
    target = victim.target()
    assert target is not None and (target.granules, target.enforced) == (40, NOT_ENFORCED)
    entitled.post_targets(10, 60.0)
    target = victim.target()
    assert target is not None and (target.granules, target.enforced) == (30, 50)
    ledger.check()
    # The right is of the sum of what was asked by right.
    entitled.post_targets(15, 60.0)
    target = victim.target()
    assert target is not None and (target.granules, target.enforced) == (25, 45)


def test_what_running_requests_keep_from_equals_they_do_not_keep_from_a_right(ledger: Ledger) -> None:
    """An equal's ask that they cannot meet gets overdue, and stays, for somebody always waits."""
    rich, poor, needy = join(ledger, "rich"), join(ledger, "poor"), join(ledger, "needy", floor=20)
    for busy in (rich, poor, needy):
        busy.set_activity(True, 0, 1)
    assert rich.try_reserve(Kind.KV, 60)
    fill(ledger)
    poor.post_targets(20, 0.0)
    poor.post_targets(20, 60.0)
    target = rich.target()
    assert target is not None and target.overdue(time.monotonic_ns())
    (posted,) = needy.post_targets(20, 60.0)
    target = rich.target()
    assert target is not None and (posted.granules, target.enforced) == (20, 40)
    assert not target.overdue(time.monotonic_ns()), "its requests have their time, which began with the right"
    assert needy.post_targets(20, 60.0) == []  # it is coming
    assert needy.owed() == 20
    rich.release(Kind.KV, 20)
    assert needy.try_reserve(Kind.KV, 20)
    assert needy.owed() == 0
    ledger.check()


def test_a_target_is_wanted_while_somebody_asks_or_the_ceiling_demands_it(ledger: Ledger) -> None:
    victim, asker = join(ledger, "victim"), join(ledger, "asker", floor=10)
    assert victim.try_reserve(Kind.KV, 60)
    assert not victim.is_target_wanted()
    asker.post_targets(10, 60.0)
    assert victim.is_target_wanted() and not asker.is_target_wanted()
    asker.set_activity(True, 0, 1)  # wants nothing any more
    assert not victim.is_target_wanted()
    asker.post_targets(10, 0.0)
    assert not victim.is_target_wanted(), "an ask ends with its time"
    victim.set_quota(0, 40)
    assert victim.is_target_wanted()


def test_an_answer_counts_for_its_own_target_only(ledger: Ledger) -> None:
    victim = join(ledger, "victim")
    asker = join(ledger, "asker", floor=90)
    assert victim.try_reserve(Kind.KV, 100)
    (early,) = asker.post_targets(10, 60.0)
    (late,) = asker.post_targets(30, 60.0)
    victim.answer_target(early.target.seq)
    assert victim.target() == late.target
    victim.answer_target(late.target.seq + 1)
    assert victim.target() == late.target
    victim.answer_target(late.target.seq)
    assert victim.target() is None
    assert len(asker.post_targets(30, 60.0)) == 1  # not given, so asked for again


def test_what_comes_free_waits_for_whoever_asked(ledger: Ledger) -> None:
    victim = join(ledger, "victim", floor=10)
    asker = join(ledger, "asker", floor=20)
    assert victim.try_reserve(Kind.KV, 100)
    asker.post_targets(20, 60.0)
    victim.release(Kind.KV, 20)
    # A busy victim would take it back at once.
    assert not victim.try_reserve(Kind.KV, 1)
    assert victim.reserve_up_to(Kind.KV, 5) == 0
    assert asker.try_reserve(Kind.KV, 15)
    assert not victim.try_reserve(Kind.KV, 1)
    asker.set_activity(True, 0, 0)  # wants no more
    assert victim.try_reserve(Kind.KV, 5)


def test_what_is_free_waits_with_what_is_asked_for(ledger: Ledger) -> None:
    """A victim that borrows the free rest would leave an asker of whole pages short of one."""
    victim, asker = join(ledger, "victim", floor=10), join(ledger, "asker", floor=40)
    assert victim.try_reserve(Kind.KV, 90)
    (posted,) = asker.post_targets(30, 60.0)
    assert posted.granules == 20  # ten are free
    assert not victim.try_reserve(Kind.KV, 1)
    victim.release(Kind.KV, 20)
    assert victim.reserve_up_to(Kind.KV, 20) == 0
    assert asker.try_reserve(Kind.KV, 30)


def test_what_is_free_for_who_asked_before_is_not_free_for_us(ledger: Ledger) -> None:
    victim, first, second = join(ledger, "victim"), join(ledger, "first", floor=30), join(ledger, "second")
    assert victim.try_reserve(Kind.KV, 80)
    assert first.post_targets(20, 60.0) == []
    assert [p.granules for p in second.post_targets(10, 60.0)] == [10]


def test_what_an_owner_may_claim_by_right_does_not_wait(ledger: Ledger) -> None:
    asker, other = join(ledger, "asker", floor=20), join(ledger, "other", floor=10)
    asker.post_targets(95, 60.0)
    assert other.reserve_up_to(Kind.KV, 20) == 10
    assert other.try_reserve(Kind.WEIGHTS, 5)


def test_of_two_that_borrow_the_first_to_ask_goes_first(ledger: Ledger) -> None:
    victim, first, second = (join(ledger, name) for name in ("victim", "first", "second"))
    assert victim.try_reserve(Kind.KV, 100)
    first.post_targets(10, 60.0)
    second.post_targets(10, 60.0)
    first.post_targets(10, 60.0)  # asking again keeps the place
    victim.release(Kind.KV, 10)
    assert not second.try_reserve(Kind.KV, 10)
    assert first.try_reserve(Kind.KV, 10)
    victim.release(Kind.KV, 10)
    assert second.try_reserve(Kind.KV, 10)


def test_an_ask_ends_with_its_time_or_its_owner(ledger: Ledger) -> None:
    victim, asker = join(ledger, "victim"), join(ledger, "asker", floor=50)
    asker.post_targets(50, 0.0)
    assert victim.try_reserve(Kind.KV, 100)
    victim.release(Kind.KV, 100)
    asker.post_targets(50, 60.0)
    assert not victim.try_reserve(Kind.KV, 100)
    asker.leave()
    assert victim.try_reserve(Kind.KV, 100)


@pytest.mark.parametrize("floor", [70, 90])
def test_a_target_follows_a_raised_floor(ledger: Ledger, floor: int) -> None:
    victim, asker = join(ledger, "victim", floor=10), join(ledger, "asker", floor=50)
    assert victim.try_reserve(Kind.KV, 100)
    asker.post_targets(20, 60.0)
    victim.set_quota(floor, 100)
    target = victim.target()
    assert target is not None
    assert target.granules == max(80, floor)
    ledger.check()


def test_a_lowered_ceiling_is_a_target_without_a_deadline(ledger: Ledger) -> None:
    owner = join(ledger, "chat")
    assert owner.try_reserve(Kind.KV, 50)
    owner.set_quota(0, 30)
    target = owner.target()
    assert target is not None
    assert target.granules == 30
    assert not target.overdue(time.monotonic_ns())
    ledger.check()
    owner.release(Kind.KV, 20)
    assert owner.target() is None


# ---------------------------------------------------------------- sleepers in the ledger


def fall_asleep(owner: Owner) -> None:
    owner.release(Kind.KV, owner.held(Kind.KV))
    owner.set_state(RuntimeState.ASLEEP)


def test_a_sleeper_settles_its_target_by_giving_weights_back(ledger: Ledger) -> None:
    sleeper, asker = join(ledger, "sleeper", floor=20), join(ledger, "asker", floor=50)
    assert sleeper.try_reserve(Kind.WEIGHTS, 60)
    assert sleeper.try_reserve(Kind.OVERHEAD, 5)
    fall_asleep(sleeper)
    fill(ledger)
    (posted,) = asker.post_targets(25, 60.0)
    assert (posted.name, posted.granules, posted.target.granules) == ("sleeper", 25, 35)
    assert sleeper.target() == posted.target
    assert asker.post_targets(25, 60.0) == []  # it is on its way
    sleeper.release(Kind.WEIGHTS, 24)
    assert sleeper.target() == posted.target
    assert asker.post_targets(25, 60.0) == []  # one is on its way, the others are there
    sleeper.release(Kind.WEIGHTS, 1)
    assert sleeper.target() is None
    ledger.check()


def test_a_sleeper_may_lose_all_its_weights_but_no_more(ledger: Ledger) -> None:
    """Not its overhead, and its floor is of KV, which it has none of."""
    sleeper, asker = join(ledger, "sleeper", floor=20), join(ledger, "asker", floor=100)
    assert sleeper.try_reserve(Kind.WEIGHTS, 10)
    assert sleeper.try_reserve(Kind.OVERHEAD, 5)
    fall_asleep(sleeper)
    (posted,) = asker.post_targets(100, 60.0)
    assert (posted.granules, posted.target.granules) == (10, 0)
    assert asker.post_targets(100, 60.0) == []
    ledger.check()
    sleeper.release(Kind.WEIGHTS, 10)
    assert sleeper.target() is None
    assert asker.post_targets(100, 60.0) == []


def test_awake_weights_are_not_asked_for(ledger: Ledger) -> None:
    awake, asker = join(ledger, "awake"), join(ledger, "asker", floor=100)
    assert awake.try_reserve(Kind.WEIGHTS, 60)
    assert awake.try_reserve(Kind.KV, 10)
    (posted,) = asker.post_targets(100, 60.0)
    assert (posted.granules, posted.target.granules) == (10, 0)
    awake.release(Kind.WEIGHTS, 1)  # answers nothing
    assert awake.target() == posted.target


def test_a_change_of_state_settles_targets_and_who_lacks_memory_asks_again(ledger: Ledger) -> None:
    victim, asker = join(ledger, "victim"), join(ledger, "asker", floor=90)
    assert victim.try_reserve(Kind.KV, 40)
    assert victim.try_reserve(Kind.WEIGHTS, 50)
    fill(ledger)
    assert [p.target.granules for p in asker.post_targets(30, 60.0)] == [10]
    victim.set_state(RuntimeState.AWAKE)  # no change
    assert victim.target() is not None
    fall_asleep(victim)
    fill(ledger)
    assert victim.target() is None
    assert [(p.granules, p.target.granules) for p in asker.post_targets(30, 60.0)] == [(30, 20)]
    victim.set_state(RuntimeState.WAKING)
    assert victim.target() is None
    assert asker.post_targets(30, 60.0) == []  # one that wakes is not asked
    victim.set_state(RuntimeState.AWAKE)
    victim.release(Kind.WEIGHTS, 5)
    asker.set_activity(True, 0, 1)  # what is free waits for it until it wants no more
    assert victim.try_reserve(Kind.KV, 5)
    assert [(p.granules, p.target.granules) for p in asker.post_targets(30, 60.0)] == [(5, 0)]
    ledger.check()


def test_what_was_asked_before_a_change_of_state_is_owed_no_more(ledger: Ledger) -> None:
    """The first asker's target was of KV; it must not take the second's, of weights, for its own."""
    victim = join(ledger, "victim")
    first, second = join(ledger, "first", floor=90), join(ledger, "second", floor=90)
    assert victim.try_reserve(Kind.KV, 40)
    assert victim.try_reserve(Kind.WEIGHTS, 60)
    assert [p.target.granules for p in first.post_targets(10, 60.0)] == [30]
    fall_asleep(victim)
    fill(ledger)
    assert [p.target.granules for p in second.post_targets(20, 60.0)] == [40]
    assert [(p.granules, p.target.granules) for p in first.post_targets(10, 60.0)] == [(10, 30)]
    assert first.post_targets(10, 60.0) == []


def test_a_quota_does_not_ask_a_sleeper_for_anything(ledger: Ledger) -> None:
    sleeper, asker = join(ledger, "sleeper", floor=10), join(ledger, "asker", floor=50)
    assert sleeper.try_reserve(Kind.WEIGHTS, 60)
    fall_asleep(sleeper)
    sleeper.set_quota(5, 20)  # of KV: 60 granules of weights are not above the ceiling
    assert sleeper.target() is None
    (posted,) = asker.post_targets(50, 60.0)
    sleeper.set_quota(40, 40)
    assert sleeper.target() == posted.target  # nor does a floor of KV keep weights
    ledger.check()
