"""What the ledger says, as values: copies that no later change in the file reaches.

Amounts are granules of 2 MiB. Times are ``time.monotonic_ns()``, which all processes of a host share.
"""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass

from prism_sgl.messages import RuntimeState

# States in which a runtime passes safe points, so that it can answer a reclaim target.
_ANSWERS = frozenset({RuntimeState.AWAKE, RuntimeState.DRAINING, RuntimeState.ASLEEP})

NOT_ENFORCED = sys.maxsize


class Kind(enum.IntEnum):
    """What granules are held for."""

    WEIGHTS = 0
    KV = 1
    OVERHEAD = 2


@dataclass(frozen=True, slots=True)
class Totals:
    """``free`` may be reserved; ``returning`` is what dead owners left, until the device shows it free."""

    budget: int
    leased: int
    returning: int
    free: int


@dataclass(frozen=True, slots=True)
class Target:
    """A victim should shrink what is elastic of it to ``granules``.

    It admits no more until it has, and gives what its running requests do not need. Down to ``enforced`` somebody has
    a right to it: after the deadline these requests go back to the queue.
    """

    granules: int
    seq: int
    deadline_ns: int
    enforced: int = NOT_ENFORCED

    def overdue(self, now_ns: int) -> bool:
        return now_ns >= self.deadline_ns


@dataclass(frozen=True, slots=True)
class Posted:
    """One victim was asked for ``granules`` more."""

    slot: int
    epoch: int
    name: str
    bell: str
    granules: int
    target: Target
    by_right: bool


@dataclass(frozen=True, slots=True)
class OwnerView:
    """One slot, at one moment. ``alive`` is False for a dead owner that is not reaped yet."""

    slot: int
    epoch: int
    pid: int
    name: str
    bell: str
    alive: bool
    state: RuntimeState
    priority: int
    share: int  # thousandths; of what busy owners borrow, against the others' shares
    weights: int
    kv: int
    overhead: int
    floor: int
    ceiling: int
    busy: bool
    wanted: int
    idle_since_ns: int
    target: Target | None  # None: none, or answered
    answered_seq: int  # all targets up to this one are settled

    @property
    def held(self) -> int:
        return self.weights + self.kv + self.overhead

    @property
    def is_asleep(self) -> bool:
        return self.state is RuntimeState.ASLEEP

    @property
    def elastic(self) -> int:
        """What a target counts: KV, and asleep the weights too, for their image can bring them back."""
        return self.kv + self.weights if self.is_asleep else self.kv

    @property
    def kept(self) -> int:
        """The part of ``elastic`` that nobody may ask for."""
        return 0 if self.is_asleep else self.floor

    @property
    def surplus(self) -> int:
        """What it holds beyond what it has a right to."""
        return self.elastic - self.kept

    @property
    def reclaimable(self) -> int:
        """What may still be asked of it: surplus that nobody has asked for yet."""
        return self._beyond(self.elastic if self.target is None else self.target.granules)

    @property
    def enforceable(self) -> int:
        """What may still be asked of it by right: surplus that nobody has asked for by right yet."""
        return self._beyond(self.elastic if self.target is None else self.target.enforced)

    @property
    def is_enforced(self) -> bool:
        """Somebody has a right to a part of what it holds, and has asked for it."""
        return self.target is not None and self.target.enforced < self.elastic

    def _beyond(self, promised: int) -> int:
        """Of what it holds above what it keeps, the part that a target down to ``promised`` leaves."""
        if not self.alive or self.state not in _ANSWERS:
            return 0
        return max(0, min(self.elastic, promised) - self.kept)
