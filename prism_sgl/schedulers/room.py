"""Room on devices at work: whose memory is found for whom, who is told to give it, and how turns end.

``memory_plan`` decides over one device; a model over several needs room on all of theirs. It is found for all of its
parts or for none: one that had a part of its room and waited for the rest would keep that from another which does the
same. Parts that give do so together (lifecycle.py), so what the others of a victim give is counted where they are.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from prism_sgl.config import SchedulerConfig
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.grants import Shortage
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.memory_plan import Room, Verdict, find_room, kv_victims
from prism_sgl.schedulers.pictures import Pictures
from prism_sgl.schedulers.records import AWAKE, DRAINING, Device, Model, Role, Runtime
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.units import show_size

# A runtime that takes more KV than it gets for this long has a lasting need, not a burst.
_KV_WANTED_S = 1.0


@dataclass(frozen=True, eq=False)
class Need:
    """What a model, or one part of it, must have on a device to be awake there."""

    model: Model
    device: Device
    size_bytes: int


@dataclass(frozen=True)
class Asker:
    """How pressing it is."""

    urgent: bool
    waits_since: float
    now: float


class RoomMaker:
    """Owner of the turns, and of which devices lack KV."""

    def __init__(
        self, limits: SchedulerConfig, fleet: Fleet, table: RequestTable, lifecycle: Lifecycle
    ) -> None:
        self._limits = limits
        self._fleet = fleet
        self._table = table
        self._lifecycle = lifecycle
        self._turns: dict[str, str] = {}  # model that drains -> model that it drains for
        self._short: dict[str, Shortage] = {}  # devices that lack KV
        self._kv_look_at = math.inf

    @property
    def next_at(self) -> float:
        """When more idle models may give KV."""
        return self._kv_look_at

    @property
    def has_turns(self) -> bool:
        return bool(self._turns)

    # ------------------------------------------------------------ for who wants to be awake

    def find(self, needs: Sequence[Need], asker: Asker, pictures: Pictures) -> dict[Need, Room]:
        """A room for each need, claimed; or nothing is claimed, and the last one says where it is blocked."""
        if len(needs) == 1:
            return {needs[0]: self._find(needs[0], asker, pictures, set())}
        before = pictures.claims()
        # Who gives on several devices is sought first: beside it others need not give.
        alone: dict[Need, Room] = {}
        for need in needs:
            alone[need] = self._find(need, asker, pictures, set())
            pictures.undo(before)
        going: set[str] = set()
        rooms: dict[Need, Room] = {}
        for need in sorted(needs, key=lambda need: not _has_parts(alone[need], need)):
            rooms[need] = self._find(need, asker, pictures, going)
            if rooms[need].verdict is Verdict.BLOCKED:
                pictures.undo(before)
                break
        return rooms

    def _find(self, need: Need, asker: Asker, pictures: Pictures, going: set[str]) -> Room:
        """``going``: parts that give because others of their model do."""
        residents = pictures.residents(need.device)
        if going:
            residents = [resident for resident in residents if resident.model not in going]
        room = find_room(
            need.size_bytes,
            pictures.tally(need.device),
            residents,
            asker.now,
            self._limits,
            urgent=asker.urgent,
            waits_since=asker.waits_since,
        )
        for victim in (*room.sleep, *room.drain):
            for sibling in need.device.residents[victim].together[1:]:
                going.add(sibling.model.name)
                if sibling.state is AWAKE:
                    there = pictures.tally(self._fleet.devices[sibling.device or ""])
                    there.coming_bytes += pictures.gives_bytes(sibling)
        return room

    def take(self, room: Room, need: Need, now: float) -> None:
        """Its victims begin to give."""
        wish = f"{need.model.name} wants {show_size(need.size_bytes)}"
        for name in room.sleep:
            runtime = need.device.residents[name]
            self._lifecycle.give_way(runtime, now, f"idle {now - runtime.idle_since:.0f} s, {wish}")
        for name in room.drain:
            runtime = need.device.residents[name]
            if runtime.role is Role.HOME:
                self._turns[name] = need.model.lead.name
            # Its answers have as long to end as the other has waited; then they wait for its next turn.
            preempt_at = now + self._limits.max_wait_s
            self._lifecycle.give_way(runtime, now, f"{wish} and has waited its time", preempt_at=preempt_at)

    def follow_turns(self, wanting: Container[str], now: float) -> float:
        """End those whose time is over or whose memory is no longer wanted; when the next one ends."""
        look_at = math.inf
        for victim, wants in list(self._turns.items()):
            model = self._fleet.models[victim]
            runtime = model.runtime
            if runtime.state is not DRAINING or runtime.sleep_sent_at is not None:
                del self._turns[victim]
            elif wants not in wanting:
                del self._turns[victim]
                self._lifecycle.call_off_drain(runtime, now)
            elif now >= runtime.preempt_at:
                self._lifecycle.settle(model, now)
            else:
                look_at = min(look_at, runtime.preempt_at)
        return look_at

    # ------------------------------------------------------------ for KV, and for the account

    def kv_wanted(self, runtime: Runtime, now: float) -> None:
        """An engine says that it takes more KV than it gets: one neighbour after the other gives."""
        lasts = runtime.wanted_since is not None and now - runtime.wanted_since > _KV_WANTED_S
        if lasts and runtime.device is not None:
            self._make_kv_room(runtime.device, Shortage(1, waits=True), now)

    def make_kv_room(self, changed: Mapping[str, Shortage], now: float) -> None:
        """Idle models sleep where requests in flight will want more KV than there is, or others wait for it."""
        for name, shortage in changed.items():
            if shortage.missing_bytes > 0:
                self._short[name] = shortage
            else:
                self._short.pop(name, None)
        if now >= self._kv_look_at:
            due, self._kv_look_at = list(self._short), math.inf
        else:
            due = [name for name in changed if name in self._short]
        for name in due:
            self._make_kv_room(name, self._short[name], now)

    def _make_kv_room(self, name: str, shortage: Shortage, now: float) -> None:
        device = self._fleet.devices[name]
        pictures = Pictures(self._fleet, self._table, now, self._limits.sleep_after_s)
        missing_bytes = shortage.missing_bytes - pictures.tally(device).coming_bytes
        victims, look_at = kv_victims(
            missing_bytes, pictures.residents(device), now, self._limits, waits=shortage.waits
        )
        self._kv_look_at = min(self._kv_look_at, look_at)
        for victim in victims:
            why = f"idle {now - victim.idle_since:.0f} s, {name} wants KV"
            self._lifecycle.give_way(device.residents[victim.model], now, why)

    def settle_excess(self, device: Device, pictures: Pictures, now: float) -> float:
        """Facts turned out larger than the files told: idle models give until the account is even. When to look
        again."""
        if any(r.adopted and not r.known for r in device.residents.values()):
            return math.inf  # charged as if awake until its Hello, so the excess may be none
        tally, residents = pictures.tally(device), pictures.residents(device)
        room = find_room(0, tally, residents, now, self._limits, urgent=True, waits_since=math.inf)
        for name in room.sleep:
            self._lifecycle.give_way(device.residents[name], now, f"{device.name} promised more than it has")
        pictures.changed(device.name)
        return room.look_at


def _has_parts(room: Room, need: Need) -> bool:
    victims = (need.device.residents[name].model for name in (*room.sleep, *room.drain))
    return any(model.siblings for model in victims)
