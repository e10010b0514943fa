"""Which models shall be awake, and when each is woken or started.

A *want* is a model that shall be awake and is not. Wants are served in a fixed order (requests before preloads,
then who wants longest), and one that waits for memory claims what is free or coming on its device before the
next one is looked at; so a small model cannot for ever take the bytes that a big one waits for.

A model over several devices has one want, with one age, as long as any of its parts shall be awake and is not. They
are woken together, when all have their room (room.py); one whose turn is due keeps all its devices for itself. So of
models that share devices the one that has waited longest is served first on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from prism_sgl.config import Config
from prism_sgl.schedulers import placement
from prism_sgl.schedulers.admin import AdminDesk
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.memory_plan import Verdict, idle_victim_at
from prism_sgl.schedulers.moves import Mover
from prism_sgl.schedulers.pictures import Pictures, demand, is_busy
from prism_sgl.schedulers.placement import Choice
from prism_sgl.schedulers.records import (
    ASLEEP,
    AWAKE,
    COLD,
    DRAINING,
    FAILED,
    STOPPING,
    Device,
    Model,
    Role,
    Runtime,
)
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.requests import RequestDesk
from prism_sgl.schedulers.room import Asker, Need, RoomMaker
from prism_sgl.schedulers.supervisor import SupervisorDesk
from prism_sgl.units import show_size

# After so many wakes that found no memory where the account says there is some, idle neighbours give theirs.
_SHORTAGES = 2
_NO_ROOM_RETRY_S = 60.0
_DOWN = frozenset({COLD, FAILED, ASLEEP})


@dataclass
class _Want:
    since: float
    urgent: bool  # a request or an operator waits for it
    devices: dict[str, str] = field(default_factory=dict)  # where room is being made for each of its parts
    chosen_at: float = -math.inf  # when it was last asked which of its two devices is the better one


@dataclass
class _Pass:
    """One going through of all wants."""

    pictures: Pictures
    now: float
    blocked: set[str] = field(default_factory=set)  # devices whose next room is one want's
    # By device and urgency, what somebody asked for in vain: to ask for as much again would be in vain too.
    too_much: dict[tuple[str, bool], float] = field(default_factory=dict)


class Activation:
    """Owner of the wants."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        table: RequestTable,
        desk: RequestDesk,
        lifecycle: Lifecycle,
        supervisor: SupervisorDesk,
        admin: AdminDesk,
        mover: Mover,
        rooms: RoomMaker,
    ) -> None:
        self._limits = config.scheduler
        self._fleet = fleet
        self._table = table
        self._desk = desk
        self._lifecycle = lifecycle
        self._supervisor = supervisor
        self._admin = admin
        self._mover = mover
        self._rooms = rooms
        self._wants: dict[str, _Want] = {}  # by lead
        self._retries: dict[str, float] = {}  # models that could not load, and when they are tried again
        self._look_at = math.inf
        self._dirty = False
        self._moves_seen = 0

    @property
    def next_at(self) -> float:
        """When time alone may change something."""
        return min(self._look_at, self._rooms.next_at, min(self._retries.values(), default=math.inf))

    def waited_for(self) -> set[str]:
        """Devices where somebody waits for memory."""
        devices = (
            part.runtime.device or want.devices.get(part.name)
            for name, want in self._wants.items()
            for part in _down(self._fleet.models[name])
        )
        return {device for device in devices if device is not None}

    # ------------------------------------------------------------ wants

    def preload(self, now: float) -> None:
        """The supervisor has said what is alive: start what shall be up, spread as placement would have it."""
        cold = [m for m in self._fleet.models.values() if m.config.preload and m.runtime.state is COLD]
        pictures = Pictures(self._fleet, self._table, now, self._limits.sleep_after_s)
        demands = [demand(model, self._fleet, now) for model in cold]
        spread = placement.plan(demands, pictures.places(), pictures.kv_unit())
        for model in cold:
            model.start_wanted = True
            self.consider(model, now)
            if (device := spread[model.name].device) is not None:
                self._wants[model.lead.name].devices[model.name] = device

    def consider(self, model: Model, now: float) -> None:
        """Something about this model has changed: does it want to be awake?"""
        state = model.runtime.state
        if state is FAILED and model.failure and model.retry_at <= now:
            model.start_wanted, model.retry_at = True, math.inf  # its start may be blocked for long
        if state is FAILED and model.failure and model.retry_at < math.inf:
            self._retries[model.name] = model.retry_at
        else:
            self._retries.pop(model.name, None)
        lead = model.lead
        urgent = (
            bool(self._table.queued(lead.name))
            or self._admin.wants_awake(lead)
            or self._lifecycle.is_set_aside(lead.runtime)
        )
        wanted = any(
            urgent or (part.start_wanted and part.runtime.state is not ASLEEP) for part in _down(lead)
        )
        want = self._wants.get(lead.name)
        if not wanted:
            if want is not None:
                del self._wants[lead.name]
                self._dirty = True
        elif want is None:
            self._wants[lead.name] = _Want(now, urgent)
            self._dirty = True
        elif want.urgent != urgent:
            # Turns are counted from when somebody waits, not from when a preload began to want.
            want.since, want.urgent, self._dirty = now, urgent, True
        if (
            state is AWAKE
            and (self._wants or self._rooms.has_turns or self._owes(model))
            and not is_busy(model.runtime, self._table)
        ):
            self._dirty = True

    def _owes(self, model: Model) -> bool:
        """Its device promised more than it has."""
        return self._fleet.devices[model.runtime.device or ""].free_bytes < 0

    def run(self, now: float) -> None:
        """Make room and start or wake what now has it. Does nothing unless something that matters has changed."""
        for name in [name for name, at in self._retries.items() if at <= now]:
            self.consider(self._fleet.models[name], now)
        if not self._supervisor.known:
            return
        is_calm = self._moves_seen == self._fleet.num_moves and not self._mover.has_news
        if is_calm and not self._dirty and now < self._look_at:
            return
        self._dirty, self._look_at, self._moves_seen = False, math.inf, self._fleet.num_moves
        seen = _Pass(Pictures(self._fleet, self._table, now, self._limits.sleep_after_s), now)
        for device in self._fleet.devices.values():
            if device.free_bytes < 0:
                self._look_at = min(self._look_at, self._rooms.settle_excess(device, seen.pictures, now))
        ordered = sorted(self._wants.items(), key=lambda w: (not w[1].urgent, w[1].since))
        for name, want in ordered:
            self._serve(self._fleet.models[name], want, seen)
        self._mover.make_room(seen.pictures, now)
        if self._limits.spares and not self._wants:
            self._look_at = min(self._look_at, self._mover.start_spare(seen.pictures, now))
        self._look_at = min(self._look_at, self._rooms.follow_turns(self._wants, now))

    def _serve(self, model: Model, want: _Want, seen: _Pass) -> None:
        parts = _down(model)
        if seen.now < (not_before := max(part.not_before for part in parts)):
            self._look_at = min(self._look_at, not_before)
            return
        starts = any(part.runtime.state is not ASLEEP for part in parts)
        if starts and self._fleet.num_starting >= self._limits.start_parallel:
            return  # the end of a start is a move, which leads here again
        if any(part.runtime.state in (DRAINING, STOPPING) for part in model.parts):
            return  # as the end of those is
        needs = self._needs(parts, want, seen)
        if not needs:
            return
        overdue = want.urgent and seen.now >= want.since + self._limits.max_wait_s
        if not overdue and any(
            need.size_bytes >= seen.too_much.get((need.device.name, want.urgent), math.inf) for need in needs
        ):
            return  # less than this was not to be had a moment ago, and who asked came first
        rooms = self._rooms.find(needs, Asker(want.urgent, want.since, seen.now), seen.pictures)
        self._look_at = min(self._look_at, *(room.look_at for room in rooms.values()))
        lacking, last = list(rooms.items())[-1]
        if last.verdict is Verdict.BLOCKED:
            if want.urgent:
                again_at = self._mover.seek(
                    lacking.model, lacking.size_bytes, seen.pictures, self.waited_for, seen.now
                )
                self._look_at = min(self._look_at, again_at)
            if overdue:  # its turn is due: nobody behind it takes what comes free
                seen.blocked.update(need.device.name for need in needs)
            seen.too_much[lacking.device.name, want.urgent] = lacking.size_bytes
            return
        if all(room.verdict is Verdict.NOW for room in rooms.values()):
            del self._wants[model.name]
            for need in needs:
                self._activate(need, want, seen)
        else:
            for need, room in rooms.items():
                want.devices[need.model.name] = need.device.name
                self._rooms.take(room, need, seen.now)
        for need in needs:
            seen.pictures.changed(need.device.name)

    def _needs(self, parts: Sequence[Model], want: _Want, seen: _Pass) -> list[Need]:
        """Of each part; none if one of them can be awake nowhere now, or where another's turn is due."""
        needs = []
        for part in parts:
            device = self._device_for(part, want, seen)
            if device is None or device.name in seen.blocked:
                return []
            needs.append(Need(part, device, self._fleet.mapped_bytes(part) - part.runtime.charged_bytes))
        return needs

    def _activate(self, need: Need, want: _Want, seen: _Pass) -> None:
        model, device = need.model, need.device
        why = "a request waits" if want.urgent else "shall be up"
        if model.runtime.state is not ASLEEP:
            self._lifecycle.start(model, device, seen.now, why)
            return
        if model.shortages >= _SHORTAGES:
            idle = [r for r in seen.pictures.residents(device) if not r.pinned and not r.busy]
            ready = [r for r in idle if idle_victim_at(r, self._limits, want.urgent) <= seen.now]
            if ready:
                victim = min(ready, key=lambda r: (r.idle_since, r.model))
                self._lifecycle.give_way(
                    device.residents[victim.model], seen.now, f"{model.name} finds no memory on {device.name}"
                )
                seen.pictures.changed(device.name)
        self._lifecycle.wake(model.runtime, seen.now, why)

    # ------------------------------------------------------------ where

    def _device_for(self, model: Model, want: _Want, seen: _Pass) -> Device | None:
        """Where it sleeps, or where placement puts it; None if it can be awake nowhere, or moves first."""
        # Requests that were set aside go on where they are, and nowhere else.
        is_free = model.runtime.state is ASLEEP and not self._lifecycle.is_set_aside(model.runtime)
        spare = model.spare if is_free else None
        # What a model keeps asleep counts as the home's on one device and as a spare's on the other: near the edge of
        # what fits each looks better from the other one, so it is asked now and then only, or they would swap for ever.
        if spare is not None and spare.is_spare and seen.now > want.chosen_at + self._limits.min_residence_s:
            want.chosen_at = seen.now
            self._wake_where_best(model, spare, seen)
        here = model.runtime.device or want.devices.get(model.name)
        taken = {runtime.device for runtime in model.runtimes}
        if here is not None and here in model.devices and here not in (taken - {model.runtime.device}):
            device = self._fleet.devices[here]
            if self._fleet.mapped_bytes(model) <= seen.pictures.possible_bytes(device, model):
                return device
        elsewhere = [place for place in seen.pictures.places() if place.device not in taken]
        its = demand(model, self._fleet, seen.now)
        choice = placement.choose(its, elsewhere, seen.pictures.kv_unit())
        if choice.device is None and any(runtime.role is not Role.SPARE for runtime in model.others):
            return None  # the end of those is a move, which leads here again
        if choice.device is None:
            if here is not None and here == model.runtime.device:
                most = show_size(max(0, seen.pictures.possible_bytes(self._fleet.devices[here], model)))
                needed = show_size(self._fleet.mapped_bytes(model))
                choice = Choice(None, f"{model.name} needs {needed}, and {here} can give {most} at most")
            self._give_up(model, choice.reason, seen.now)
            return None
        if model.runtime.device is not None:
            self._lifecycle.stop(model.runtime, seen.now, f"moves: {choice.reason}")
            model.start_wanted = True
            return None
        return self._fleet.devices[choice.device]

    def _wake_where_best(self, model: Model, spare: Runtime, seen: _Pass) -> None:
        """It sleeps on two devices."""
        its = demand(model, self._fleet, seen.now)
        devices = [self._fleet.devices[r.device] for r in (model.runtime, spare) if r.device is not None]
        choice = placement.choose(its, map(seen.pictures.place, devices), seen.pictures.kv_unit())
        if choice.device == spare.device:
            self._fleet.swap_home(spare, choice.reason)
            for device in devices:
                seen.pictures.changed(device.name)

    def _give_up(self, model: Model, reason: str, now: float) -> None:
        """It would not fit if everybody else slept."""
        lead = model.lead
        del self._wants[lead.name]
        for part in lead.parts:
            part.start_wanted, part.reason = False, reason
        self._fleet.note(f"{model.name}: cannot be awake ({reason})")
        self._admin.fail(lead, reason)
        self._desk.refuse_all(lead, "no_room", reason, _NO_ROOM_RETRY_S, now)

    def kvpr(self, device: Device, now: float) -> float:
        place = Pictures(self._fleet, self._table, now, self._limits.sleep_after_s).place(device)
        return placement.kvpr(place.pressure, place.budget_bytes - place.awake_weights_bytes)

    def check(self) -> None:
        for name in self._wants:
            assert _down(self._fleet.models[name])
        for name, model in self._fleet.models.items():
            held = self._table.queued(name) or self._table.running(model.runtime.id)
            waits = held and _down(model)
            assert not waits or name in self._wants, "a request of a sleeping model is wanted by nobody"


def _down(model: Model) -> list[Model]:
    """Its parts that have to be woken or started for it to be awake."""
    return [part for part in model.parts if part.runtime.state in _DOWN]
