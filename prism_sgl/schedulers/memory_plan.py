"""Whose memory makes room for a model that wants to be awake: plain functions over a picture of one device.

Rules, from cheap to dear (a waiting request is worth more than an idle model, never more than a busy one):

1. a model that was started and never asked for anything: at once. So many models start one after the other in
   a budget that holds one of them;
2. a model idle for ``sleep_after_s``, longest idle first (Prism: about 45 s; under 40 s thrashes);
3. if a request waits: any idle model that is resident for ``min_residence_s``, longest idle first;
4. if it has waited for ``max_wait_s``: turns. The model of lowest priority, longest awake, takes no more requests,
   ends those it has, and sleeps, though others wait for it: they wait for their turn then. One that would give on
   other devices too, where nobody may want it, is asked after the others.

Busy models that want more KV than there is: idle ones give, after ``min_residence_s`` when a request waits for
it, after ``KV_IDLE_S`` when it is only expected to be wanted.

Pinned models are never asked. Nobody sleeps in vain: victims are named only if together they suffice.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from prism_sgl.config import SchedulerConfig


@dataclass(frozen=True)
class Resident:
    """A model awake on the device that wants room, as a possible victim."""

    model: str
    gives_bytes: int  # by sleeping
    pinned: bool
    busy: bool  # requests in flight or queued, or an operator waits for it to be awake
    served: bool
    priority: int
    awake_since: float
    idle_since: float
    num_devices: int = 1  # on which it sleeps, if it does here


@dataclass
class Tally:
    """Bytes of one device that are not spoken for yet. Goes down as wants are looked at, in their order."""

    free_bytes: int
    coming_bytes: int  # of models that are draining or falling asleep

    def claim(self, needed_bytes: int) -> None:
        self.free_bytes -= needed_bytes
        if self.free_bytes < 0 <= self.coming_bytes:
            self.coming_bytes += self.free_bytes
            self.free_bytes = 0


# For KV that is only expected to be wanted. 2 s and 10 s reach the same attainment in replays, 2 s with half as many
# wakes more, 45 s two points less (one device, eight models, 12 times the rate of Arena-Chat).
KV_IDLE_S = 10.0


class Verdict(enum.Enum):
    NOW = "now"
    COMING = "coming"  # its room is claimed: others are giving it
    BLOCKED = "blocked"  # nobody can give now


@dataclass(frozen=True)
class Room:
    verdict: Verdict
    sleep: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    look_at: float = math.inf  # when time alone may change the answer


def find_room(
    needed_bytes: int,
    tally: Tally,
    residents: Sequence[Resident],
    now: float,
    limits: SchedulerConfig,
    *,
    urgent: bool,
    waits_since: float,
) -> Room:
    """Claims from the tally what it finds: now, or once the victims named have slept."""
    if needed_bytes <= tally.free_bytes:
        tally.claim(needed_bytes)
        return Room(Verdict.NOW)
    if needed_bytes <= tally.free_bytes + tally.coming_bytes:
        tally.claim(needed_bytes)
        return Room(Verdict.COMING)
    missing = needed_bytes - tally.free_bytes - tally.coming_bytes
    idle = [r for r in residents if not r.pinned and not r.busy]
    ready = sorted(
        (r for r in idle if idle_victim_at(r, limits, urgent) <= now),
        key=_longest_idle_first,
    )
    sleep = _enough(ready, missing)
    if sleep is not None:
        _give(sleep, needed_bytes, tally)
        return Room(Verdict.COMING, sleep=tuple(r.model for r in sleep))
    look_at = min((at for r in idle if (at := idle_victim_at(r, limits, urgent)) > now), default=math.inf)
    if not urgent:
        return Room(Verdict.BLOCKED, look_at=look_at)
    if now < (turn_at := waits_since + limits.max_wait_s):
        return Room(Verdict.BLOCKED, look_at=min(look_at, turn_at))
    in_turn = sorted(
        (r for r in residents if not r.pinned and r.busy and r.awake_since + limits.min_residence_s <= now),
        key=lambda r: (r.priority, r.num_devices, r.awake_since, r.model),
    )
    drain, left = _first(in_turn, missing - sum(r.gives_bytes for r in ready))
    if left > 0:
        stays = (r.awake_since + limits.min_residence_s for r in residents if not r.pinned)
        return Room(Verdict.BLOCKED, look_at=min((at for at in stays if at > now), default=look_at))
    victims = _needed([*ready, *drain], -left)
    _give(victims, needed_bytes, tally)
    return Room(
        Verdict.COMING,
        sleep=tuple(r.model for r in victims if not r.busy),
        drain=tuple(r.model for r in victims if r.busy),
    )


def idle_victim_at(resident: Resident, limits: SchedulerConfig, urgent: bool) -> float:
    """When an idle model may be sent to sleep for another."""
    if not resident.served:
        return resident.awake_since
    settled = max(resident.idle_since + limits.sleep_after_s, resident.awake_since + limits.min_residence_s)
    return min(settled, resident.awake_since + limits.min_residence_s) if urgent else settled


def kv_victims(
    missing_bytes: int, residents: Sequence[Resident], now: float, limits: SchedulerConfig, *, waits: bool
) -> tuple[list[Resident], float]:
    """Idle models that give when busy ones want more KV, as far as that goes; and when to look for more of them.

    Here some is better than none, unlike where a model must fit.
    """
    least_idle_s = limits.min_residence_s if waits else KV_IDLE_S
    ready: list[Resident] = []
    look_at = math.inf
    for resident in residents:
        if not resident.pinned and not resident.busy:
            at = resident.idle_since + least_idle_s
            if at <= now:
                ready.append(resident)
            else:
                look_at = min(look_at, at)
    chosen, missing_bytes = _first(sorted(ready, key=_longest_idle_first), missing_bytes)
    return chosen, look_at if missing_bytes > 0 else math.inf


def _enough(victims: Sequence[Resident], missing_bytes: int) -> list[Resident] | None:
    """The first of them that together give what is missing, without those whom the others make superfluous; None if
    all do not."""
    chosen, left_bytes = _first(victims, missing_bytes)
    return _needed(chosen, -left_bytes) if left_bytes <= 0 else None


def _needed(chosen: Sequence[Resident], spare_bytes: int) -> list[Resident]:
    """Of victims that together give ``spare_bytes`` too much: the later ones are let off first."""
    kept: list[Resident] = []
    for victim in reversed(chosen):
        if victim.gives_bytes <= spare_bytes:
            spare_bytes -= victim.gives_bytes
        else:
            kept.append(victim)
    return kept[::-1]


def _first(victims: Sequence[Resident], missing_bytes: int) -> tuple[list[Resident], int]:
    """As many of the first ones as it takes, and what is missing still."""
    chosen: list[Resident] = []
    for victim in victims:
        if missing_bytes <= 0:
            break
        if victim.gives_bytes > 0:
            chosen.append(victim)
            missing_bytes -= victim.gives_bytes
    return chosen, missing_bytes


def _longest_idle_first(resident: Resident) -> tuple[bool, float, str]:
    """Those that never served before all."""
    return (resident.served, resident.idle_since, resident.model)


def _give(victims: Sequence[Resident], needed_bytes: int, tally: Tally) -> None:
    tally.coming_bytes += sum(victim.gives_bytes for victim in victims)
    tally.claim(needed_bytes)
