"""Who gives memory back when an owner is short: a pure function over what the ledger says.

Only KV above a victim's floor can be asked for, and a sleeper's weights, which its image brings back. An owner
below its own floor has a right to it, so it may take from anybody; an owner above takes only from those who need it
less, with a gap between "I may ask you" and "you may ask me back": two busy owners otherwise push the same pages to
and fro.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_sgl.allocator.ledger_views import OwnerView


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask this victim for so many granules more than it was asked for already.

    ``by_right``: also at the cost of its running requests.
    """

    victim: OwnerView
    granules: int
    by_right: bool


def choose_victims(
    me: OwnerView, owners: Sequence[OwnerView], granules: int, now_ns: int, *, page: int = 1
) -> list[Claim]:
    """Whom to ask for ``granules`` in all; fewer if there are no more to be had.

    Sleepers first, then idle owners, longest idle first; then the lowest priority, then the largest surplus for its
    share. A victim that is overdue is left out: it is slow already, and a larger target brings its next safe point
    no sooner. Who has a right and misses more takes what equals were promised too, also where that is overdue: then
    its running requests need the memory, which does not count against a right.

    ``page``: what I map at once, in granules. Equals do not take a part of one from each other: whole pages are given.
    """
    ordered = [victim for victim in sorted(owners, key=_order) if victim.slot != me.slot]
    taken: dict[int, int] = {}
    missing = granules
    for victim in ordered:
        if victim.target is None or not victim.target.overdue(now_ns):
            taken[victim.slot] = max(0, min(missing, _may_take(me, victim, granules - missing, page)))
            missing -= taken[victim.slot]
    for victim in ordered:
        so_far = taken.get(victim.slot, 0)
        if _has_right(me, victim) and (victim.slot in taken or not victim.is_enforced):
            more = max(0, min(missing, victim.enforceable - so_far))
            taken[victim.slot] = so_far + more
            missing -= more
    return [
        Claim(victim, taken[victim.slot], _has_right(me, victim))
        for victim in ordered
        if taken.get(victim.slot)
    ]


def _order(owner: OwnerView) -> tuple[bool, bool, int, int, float, int]:
    idle_since_ns = 0 if owner.busy else owner.idle_since_ns
    return (
        not owner.is_asleep,
        owner.busy,
        idle_since_ns,
        owner.priority,
        -owner.surplus / owner.share,
        owner.slot,
    )


def _has_right(me: OwnerView, victim: OwnerView) -> bool:
    """Requests that are sent back are prefilled again. Among equals nobody wins by that: what one gains in waiting the
    other loses, and the card's time is lost to both (measured: three short 8B served a third less, coserve.py).
    """
    return me.kv < me.floor or victim.priority < me.priority


def _may_take(me: OwnerView, victim: OwnerView, taken: int, page: int) -> int:
    """How many granules the rank of the two allows, after ``taken`` from others."""
    if _has_right(me, victim) or victim.is_asleep or not victim.busy:
        return victim.reclaimable
    if victim.priority > me.priority:
        return 0
    # Weighted max-min fairness: less than what makes both surpluses even for their shares, so that after the move the
    # victim still has more for its share than I and could not have asked me for the same granules.
    promised = victim.surplus - victim.reclaimable
    theirs, mine = victim.surplus - promised, me.surplus + taken
    even = -(-(theirs * me.share - mine * victim.share) // (me.share + victim.share))
    return min(victim.reclaimable, max(0, even - 1 if page == 1 else even - even % page))
