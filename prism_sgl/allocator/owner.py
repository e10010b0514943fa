"""One owner's hand in the ledger: what this process holds on one device, and what it asks of its neighbours."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from prism_sgl.allocator import crash_points, doorbell, reclaim
from prism_sgl.allocator.ledger_lock import Life
from prism_sgl.allocator.ledger_table import STATES, Column, LedgerTable
from prism_sgl.allocator.ledger_views import NOT_ENFORCED, Kind, OwnerView, Posted, Target
from prism_sgl.errors import LedgerError
from prism_sgl.messages import RuntimeState

_NEVER_NS = sys.maxsize
# A requester looks again when its deadline has passed; until then what comes free is kept for it.
_ASK_LIVES_DEADLINES = 2


class Owner:
    """Writes one slot. Threads may share it; a forked child may not use it, it joins the ledger itself.

    Invariants, kept under the ledger's lock: the sum of all slots never exceeds the budget; KV grows no
    further than the ceiling; a pending target is never below the floor.
    """

    def __init__(self, table: LedgerTable, slot: int, life: Life) -> None:
        self._table = table
        self._slot = slot
        self._life = life
        self._posted: list[Posted] = []

    @property
    def slot(self) -> int:
        return self._slot

    @property
    def view(self) -> OwnerView:
        with self._table.lock:
            return self._table.owner(self._slot)

    def held(self, kind: Kind) -> int:
        return self._table.read(Column(kind), self._slot)

    # ---------------------------------------------------------------- reserving and releasing

    def try_reserve(self, kind: Kind, granules: int) -> bool:
        """Lease this many granules, or nothing (False): the budget, the ceiling or an earlier ask forbids it."""
        return self._reserve(kind, granules, granules) == granules

    def reserve_up_to(self, kind: Kind, granules: int, *, step: int = 1) -> int:
        """Lease as many of these granules as may be had, a multiple of ``step``; returns how many."""
        return self._reserve(kind, granules, step)

    def release(self, kind: Kind, granules: int) -> None:
        """Give granules back whose memory is already back with the device; rings the bells of those that wait."""
        _insist_amount(granules)
        with self._table.lock:
            self._insist_alive()
            rest = self.held(kind) - granules
            if rest < 0:
                raise ValueError(f"{granules} granules of {kind.name} released, {self.held(kind)} held")
            crash_points.crash_point("in_lock")
            self._table.write(Column(kind), self._slot, rest)
            target = self._table.target(self._slot)
            if target is not None and self._table.elastic(self._slot) <= target.granules:
                self._table.answer_targets(self._slot)
            waiting = [self._table.text(slot)[1] for slot, _ in self._others_asking(time.monotonic_ns())]
        for bell in waiting:
            doorbell.ring(bell)

    def _reserve(self, kind: Kind, granules: int, step: int) -> int:
        _insist_amount(granules)
        with self._table.lock:
            self._insist_alive()
            amount = min(granules, self._available(kind, granules))
            amount -= amount % step if step else 0
            if amount > 0:
                crash_points.crash_point("in_lock")
                self._table.write(Column(kind), self._slot, self.held(kind) + amount)
                asked = self._table.read(Column.ASKED, self._slot)
                if asked:
                    self._table.write(Column.ASKED, self._slot, max(0, asked - amount))
            return max(amount, 0)

    def _available(self, kind: Kind, granules: int) -> int:
        """What the owner may take now, looking no further than ``granules``.

        KV above the floor is borrowed: it leaves alone what comes free for others who asked before. Without that
        a busy victim takes back at once what it has just given, and the asker never gets it.
        """
        free = self._table.free()
        if kind is not Kind.KV:
            return free
        held = self.held(kind)
        free = min(free, self._table.read(Column.CEILING, self._slot) - held)
        by_right = min(free, max(0, self._table.read(Column.FLOOR, self._slot) - held))
        if min(granules, free) <= by_right:
            return by_right
        return max(by_right, min(free, self._table.free() - self._asked_before_me()))

    def _asked_before_me(self) -> int:
        """Granules that living others wait for and that go before my borrowing."""
        now_ns = time.monotonic_ns()
        mine_at = self._asked_at(now_ns)
        total = 0
        for slot, granules in self._others_asking(now_ns):
            has_right = self._table.read(Column.KV, slot) < self._table.read(Column.FLOOR, slot)
            if (has_right or self._table.read(Column.ASKED_AT, slot) < mine_at) and self._table.lives.is_held(
                slot
            ):
                total += granules
        return total

    def _others_asking(self, now_ns: int) -> Iterator[tuple[int, int]]:
        """Slots of owners that still wait, and for how many granules."""
        asks = self._table.column(Column.ASKED)
        if any(asks):
            for slot, granules in enumerate(asks):
                if (
                    slot != self._slot
                    and granules > 0
                    and self._table.read(Column.ASKED_UNTIL, slot) > now_ns
                ):
                    yield slot, granules

    def _asked_at(self, now_ns: int) -> int:
        """When my ask began, if I have one."""
        if (
            self._table.read(Column.ASKED, self._slot) <= 0
            or self._table.read(Column.ASKED_UNTIL, self._slot) <= now_ns
        ):
            return _NEVER_NS
        return self._table.read(Column.ASKED_AT, self._slot)

    # ---------------------------------------------------------------- what the router and the engine say

    def set_quota(self, floor: int, ceiling: int) -> None:
        """New bounds of KV. An owner above its new ceiling gets a target that is never overdue."""
        if not 0 <= floor <= ceiling:
            raise ValueError(f"floor {floor}, ceiling {ceiling}")
        with self._table.lock:
            self._insist_alive()
            target = self._table.target(self._slot)
            # Never floor > ceiling on the way, whatever was there before.
            self._table.write(Column.FLOOR, self._slot, 0)
            self._table.write(Column.CEILING, self._slot, ceiling)
            self._table.write(Column.FLOOR, self._slot, floor)
            if self._table.is_asleep(self._slot):
                return  # the quota is of KV, and there is none
            if target is not None and target.granules < floor:
                self._table.write_target(self._slot, floor, max(floor, target.enforced), target.deadline_ns)
            elif self.held(Kind.KV) > ceiling and (target is None or target.granules > ceiling):
                known = Target(ceiling, 0, _NEVER_NS) if target is None else target
                self._table.write_target(self._slot, ceiling, known.enforced, known.deadline_ns)

    def set_state(self, state: RuntimeState) -> None:
        """A target counts other things in another state, so a change settles it; who still lacks memory asks again."""
        with self._table.lock:
            self._insist_alive()
            if self._table.read(Column.STATE, self._slot) != STATES.index(state):
                self._table.answer_targets(self._slot)
                self._table.write(Column.STATE, self._slot, STATES.index(state))

    def set_activity(self, busy: bool, wanted: int, now_ns: int) -> None:
        """What the engine does now, told at every safe point: needs no lock, each word is only ours.

        ``wanted`` is the KV that it would take and does not get; wanting nothing withdraws its ask.
        """
        table, slot = self._table, self._slot
        if busy != bool(table.read(Column.BUSY, slot)):
            if not busy:
                table.write(Column.IDLE_SINCE, slot, now_ns)
            table.write(Column.BUSY, slot, int(busy))
        if wanted != table.read(Column.WANTED, slot):
            table.write(Column.WANTED, slot, wanted)
        if not wanted and table.read(Column.ASKED, slot):
            table.write(Column.ASKED, slot, 0)

    # ---------------------------------------------------------------- reclaim

    def target(self) -> Target | None:
        """What this owner should shrink to, None if nothing is asked. Polled at every safe point: no lock."""
        return self._table.target(self._slot)

    def is_target_wanted(self) -> bool:
        """A neighbour still waits for what it has asked for, or our ceiling demands it. Needs no lock."""
        if self.held(Kind.KV) > self._table.read(Column.CEILING, self._slot):
            return True
        return any(True for _ in self._others_asking(time.monotonic_ns()))

    def answer_target(self, seq: int) -> None:
        """This target is met, or cannot be. A later one stays."""
        with self._table.lock:
            self._insist_alive()
            if (
                self._table.read(Column.ANSWERED_SEQ, self._slot)
                < seq
                <= self._table.read(Column.TARGET_SEQ, self._slot)
            ):
                self._table.write(Column.ANSWERED_SEQ, self._slot, seq)

    def post_targets(self, granules: int, deadline_s: float, *, page: int = 1) -> list[Posted]:
        """Wait in line for so many granules, and ask neighbours for what of them is not free; rings their bells.

        What is free waits for us as well: a neighbour that borrowed it would leave us short of what it gives.
        May be repeated while they are missing: what this owner has asked for and victims still owe is counted,
        and a victim that others have asked is asked for so much more. ``page``: what we map at once, in granules.
        """
        _insist_amount(granules)
        now_ns = time.monotonic_ns()
        deadline_ns = now_ns + int(deadline_s * 1e9)
        with self._table.lock:
            self._insist_alive()
            owners = {owner.slot: owner for owner in self._table.owners()}
            self._posted = [post for post in self._posted if _owed(post, owners) > 0]
            coming = self._coming(owners, now_ns)
            late = [post.bell for post in self._posted if post.target.overdue(now_ns)]
            self._ask(granules, now_ns, deadline_ns)
            missing = granules - max(0, self._table.free() - self._asked_before_me())
            claims = reclaim.choose_victims(
                owners[self._slot], list(owners.values()), missing - coming, now_ns, page=page
            )
            posted = [self._post(claim, deadline_ns) for claim in claims]
            self._posted += posted
        for bell in dict.fromkeys([*late, *(post.bell for post in posted)]):
            doorbell.ring(bell)
        return posted

    def owed(self) -> int:
        """Granules that neighbours were asked for, have not given yet, and may still give in time."""
        if not self._posted:
            return 0
        now_ns = time.monotonic_ns()
        with self._table.lock:
            owners = {owner.slot: owner for owner in self._table.owners()}
            return self._coming(owners, now_ns)

    def overdue_victims(self) -> list[str]:
        """Names of those that have not given in time what we have a right to: asked again, and others instead."""
        now_ns = time.monotonic_ns()
        with self._table.lock:
            owners = {owner.slot: owner for owner in self._table.owners()}
            late = [p for p in self._posted if p.target.overdue(now_ns) and _owed(p, owners) > 0]
        return sorted({p.name for p in late if owners[p.slot].elastic > p.target.enforced})

    def _coming(self, owners: dict[int, OwnerView], now_ns: int) -> int:
        """What victims owe to this owner and are not late with."""
        return sum(_owed(post, owners) for post in self._posted if not post.target.overdue(now_ns))

    def _ask(self, granules: int, now_ns: int, deadline_ns: int) -> None:
        """Say that we wait, keeping our place in the line if we did already."""
        began_ns = min(self._asked_at(now_ns), now_ns)
        lasts_ns = (deadline_ns - now_ns) * _ASK_LIVES_DEADLINES
        self._table.write(Column.ASKED, self._slot, 0)
        self._table.write(Column.ASKED_AT, self._slot, began_ns)
        self._table.write(Column.ASKED_UNTIL, self._slot, now_ns + lasts_ns)
        self._table.write(Column.ASKED, self._slot, granules)

    def _post(self, claim: reclaim.Claim, deadline_ns: int) -> Posted:
        crash_points.crash_point("while_posting_target")
        victim = claim.victim
        kept, enforced = victim.elastic, NOT_ENFORCED
        if victim.target is not None:
            kept, enforced = min(kept, victim.target.granules), victim.target.enforced
            if victim.is_enforced or not claim.by_right:
                deadline_ns = min(deadline_ns, victim.target.deadline_ns)
            # Else its deadline was for what equals had asked for, and no request has to go back for that.
        if claim.by_right:
            enforced = min(victim.elastic, enforced) - claim.granules
        # A right goes before what was promised to equals.
        kept = max(victim.kept, kept - claim.granules)
        target = self._table.write_target(victim.slot, kept, enforced, deadline_ns)
        return Posted(
            victim.slot, victim.epoch, victim.name, victim.bell, claim.granules, target, claim.by_right
        )

    # ---------------------------------------------------------------- the end

    def leave(self) -> None:
        """Give the slot up. What is still held stays counted, as a dead owner's, until it is reaped."""
        with self._table.lock:
            self._insist_alive()
            if not self._table.held(self._slot):
                self._table.clear(self._slot)
            self._life.close()

    def _insist_alive(self) -> None:
        if not self._life.is_ours:
            raise LedgerError(
                f"{self._table.path}: slot {self._slot} is not ours; join the ledger in this process"
            )


def _owed(post: Posted, owners: dict[int, OwnerView]) -> int:
    """What a victim still owes to this post. Earlier posts are served first, and rights before all others, so its end
    counts from the target.
    """
    victim = owners.get(post.slot)
    if victim is None or not victim.alive or victim.epoch != post.epoch:
        return 0
    if post.target.seq <= victim.answered_seq:
        return 0  # its end may have counted other things than what is elastic now
    end = post.target.enforced if post.by_right else post.target.granules
    return min(post.granules, max(0, victim.elastic - end))


def _insist_amount(granules: int) -> None:
    if granules < 0:
        raise ValueError(f"{granules} granules")
