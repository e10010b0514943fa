"""Which models shall be awake, and the room that is made for them.

A *want* is a model that shall be awake and is not. Wants are served in a fixed order (requests before preloads,
then who wants longest), and one that waits for memory claims what is free or coming on its device before the
next one is looked at; so a small model cannot for ever take the bytes that a big one waits for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from prism_sgl.config import Config
from prism_sgl.schedulers import placement
from prism_sgl.schedulers.admin import AdminDesk
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.memory_plan import (
    Resident,
    Room,
    Tally,
    Verdict,
    find_room,
    idle_victim_at,
    longest_idle,
)
from prism_sgl.schedulers.placement import Demand, Place
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.requests import RequestDesk
from prism_sgl.schedulers.state import ASLEEP, AWAKE, COLD, DRAINING, FAILED, STOPPING, Device, Fleet, Model
from prism_sgl.units import show_size

# A runtime that takes more KV than it gets for this long has a lasting need, not a burst.
_KV_WANTED_S = 1.0
# After so many wakes that found no memory where the account says there is some, idle neighbours give theirs.
_SHORTAGES = 2
_NO_ROOM_RETRY_S = 60.0


@dataclass
class _Want:
    since: float
    urgent: bool  # a request or an operator waits for it
    device: str | None = None  # where room is being made for it


class Activation:
    """Owner of the wants."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        table: RequestTable,
        desk: RequestDesk,
        lifecycle: Lifecycle,
        admin: AdminDesk,
    ) -> None:
        self._limits = config.scheduler
        self._fleet = fleet
        self._table = table
        self._desk = desk
        self._lifecycle = lifecycle
        self._admin = admin
        self._wants: dict[str, _Want] = {}
        self._retries: dict[str, float] = {}  # models that could not load, and when they are tried again
        self._turns: dict[str, str] = {}  # model that drains -> model that it drains for
        self._look_at = math.inf
        self._dirty = False
        self._moves_seen = 0

    @property
    def next_at(self) -> float:
        """When time alone may change something."""
        return min(self._look_at, min(self._retries.values(), default=math.inf))

    # ------------------------------------------------------------ wants

    def preload(self, now: float) -> None:
        """The supervisor has said what is alive: start what shall be up, spread as placement would have it."""
        cold = [m for m in self._fleet.models.values() if m.config.preload and m.runtime.state is COLD]
        places = [self._place(device, None, now) for device in self._fleet.devices.values()]
        spread = placement.plan([self._demand(model, now) for model in cold], places)
        for model in cold:
            model.start_wanted = True
            self.consider(model, now)
            self._wants[model.name].device = spread[model.name].device

    def consider(self, model: Model, now: float) -> None:
        """Something about this model has changed: does it want to be awake?"""
        state = model.runtime.state
        if state is FAILED and model.failure and model.retry_at < math.inf:
            self._retries[model.name] = model.retry_at
            if model.retry_at <= now:
                model.start_wanted = True
        else:
            self._retries.pop(model.name, None)
        urgent = bool(self._table.queued(model.name)) or self._admin.wants_awake(model)
        wanted = (urgent and state is ASLEEP) or ((urgent or model.start_wanted) and state in (COLD, FAILED))
        want = self._wants.get(model.name)
        if not wanted:
            if want is not None:
                del self._wants[model.name]
                self._dirty = True
        elif want is None:
            self._wants[model.name] = _Want(now, urgent)
            self._dirty = True
        elif want.urgent != urgent:
            # Turns are counted from when somebody waits, not from when a preload began to want.
            want.since, want.urgent, self._dirty = now, urgent, True
        if state is AWAKE and (self._wants or self._turns) and not self._is_busy(model):
            self._dirty = True

    def run(self, now: float) -> None:
        """Make room and start or wake what now has it. Does nothing unless something that matters has changed."""
        for name in [name for name, at in self._retries.items() if at <= now]:
            self.consider(self._fleet.models[name], now)
        if not self._lifecycle.supervisor_known:
            return
        if not self._dirty and now < self._look_at and self._moves_seen == self._fleet.num_moves:
            return
        self._dirty, self._look_at, self._moves_seen = False, math.inf, self._fleet.num_moves
        tallies = {d.name: self._tally(d) for d in self._fleet.devices.values()} if self._needed() else {}
        for device in self._fleet.devices.values():
            if device.free_bytes < 0:
                self._settle_excess(device, tallies[device.name], now)
        blocked: set[str] = set()
        ordered = sorted(self._wants.items(), key=lambda w: (not w[1].urgent, w[1].since))
        for name, want in ordered:
            self._serve(self._fleet.models[name], want, tallies, blocked, now)
        self._call_off_turns(now)

    def _needed(self) -> bool:
        return bool(self._wants) or any(d.free_bytes < 0 for d in self._fleet.devices.values())

    def _serve(
        self, model: Model, want: _Want, tallies: dict[str, Tally], blocked: set[str], now: float
    ) -> None:
        if now < model.not_before:
            self._look_at = min(self._look_at, model.not_before)
            return
        start = model.runtime.state is not ASLEEP
        if start and self._fleet.num_starting >= self._limits.start_parallel:
            return  # the end of a start is a move, which leads here again
        device = self._device_for(model, want, now)
        if device is None or device.name in blocked:
            return
        needed_bytes = self._fleet.mapped_bytes(model) - model.runtime.charged_bytes
        room = find_room(
            needed_bytes,
            tallies[device.name],
            self._residents(device, model),
            now,
            self._limits,
            urgent=want.urgent,
            waits_since=want.since,
        )
        self._look_at = min(self._look_at, room.look_at)
        if room.verdict is Verdict.NOW:
            self._activate(model, want, device, now)
        elif room.verdict is Verdict.COMING:
            want.device = device.name
            self._take(room, model, needed_bytes, now)
        elif want.urgent and now >= want.since + self._limits.max_wait_s:
            blocked.add(device.name)  # its turn is due: nobody behind it takes what comes free

    def _activate(self, model: Model, want: _Want, device: Device, now: float) -> None:
        del self._wants[model.name]
        why = "a request waits" if want.urgent else "shall be up"
        if model.runtime.state is not ASLEEP:
            self._lifecycle.start(model, device, now, why)
            return
        if model.shortages >= _SHORTAGES:
            idle = [r for r in self._residents(device, model) if not r.pinned and not r.busy]
            ready = [r for r in idle if idle_victim_at(r, self._limits, want.urgent) <= now]
            if ready:
                victim = min(ready, key=lambda r: (r.idle_since, r.model))
                self._sleep(victim.model, f"{model.name} finds no memory on {device.name}", now)
        self._lifecycle.wake(model, now, why)

    def _take(self, room: Room, wanting: Model, needed_bytes: int, now: float) -> None:
        wish = f"{wanting.name} wants {show_size(needed_bytes)}"
        for name in room.sleep:
            idle_s = now - self._fleet.models[name].runtime.idle_since
            self._sleep(name, f"idle {idle_s:.0f} s, {wish}", now)
        for name in room.drain:
            self._turns[name] = wanting.name
            why = f"{wish} and has waited its time"
            self._lifecycle.drain(self._fleet.models[name], now, why)

    def _sleep(self, name: str, why: str, now: float) -> None:
        self._lifecycle.drain(self._fleet.models[name], now, why)

    def _call_off_turns(self, now: float) -> None:
        for victim, wanting in list(self._turns.items()):
            model = self._fleet.models[victim]
            if model.runtime.state is not DRAINING or model.runtime.sleep_sent_at is not None:
                del self._turns[victim]
            elif wanting not in self._wants:
                del self._turns[victim]
                self._lifecycle.call_off_drain(model, now)

    # ------------------------------------------------------------ memory of others

    def kv_wanted(self, model: Model, now: float) -> None:
        """A busy model takes more KV than it gets: the longest idle neighbour sleeps, one at a time."""
        runtime = model.runtime
        if (
            runtime.wanted_since is None
            or runtime.device is None
            or now - runtime.wanted_since <= _KV_WANTED_S
        ):
            return
        device = self._fleet.devices[runtime.device]
        if any(m.runtime.state in (DRAINING, STOPPING) for m in device.residents.values()):
            return
        victim, _ = longest_idle(self._residents(device, model), now, self._limits)
        if victim is not None:
            idle_s = now - victim.idle_since
            self._sleep(victim.model, f"idle {idle_s:.0f} s, {model.name} wants KV", now)

    def _settle_excess(self, device: Device, tally: Tally, now: float) -> None:
        """Facts turned out larger than the files told: idle models give until the account is even."""
        if any(m.runtime.adopted and not m.runtime.known for m in device.residents.values()):
            return  # charged as if awake until its Hello, so the excess may be none
        residents = self._residents(device, None)
        room = find_room(0, tally, residents, now, self._limits, urgent=True, waits_since=math.inf)
        self._look_at = min(self._look_at, room.look_at)
        for name in room.sleep:
            self._sleep(name, f"{device.name} promised more than it has", now)

    def _tally(self, device: Device) -> Tally:
        coming = 0
        for model in device.residents.values():
            runtime = model.runtime
            if runtime.state is STOPPING:
                coming += runtime.charged_bytes
            elif runtime.state is DRAINING:
                coming += runtime.charged_bytes - self._fleet.asleep_bytes(model)
        return Tally(device.free_bytes, coming)

    def _residents(self, device: Device, wanting: Model | None) -> list[Resident]:
        return [
            Resident(
                model=model.name,
                gives_bytes=model.runtime.charged_bytes - self._fleet.asleep_bytes(model),
                pinned=model.pinned,
                busy=self._is_busy(model),
                served=model.runtime.served,
                priority=model.config.priority,
                awake_since=model.runtime.awake_since,
                idle_since=model.runtime.idle_since,
            )
            for model in device.residents.values()
            if model.runtime.state is AWAKE and model is not wanting
        ]

    def _is_busy(self, model: Model) -> bool:
        return bool(self._table.queued(model.name) or self._table.running(model.runtime.id))

    # ------------------------------------------------------------ where

    def _device_for(self, model: Model, want: _Want, now: float) -> Device | None:
        """Where it sleeps, or where placement puts it; None if it can be awake nowhere, or moves first."""
        demand = self._demand(model, now)
        here = model.runtime.device or want.device
        if here is not None:
            place = self._place(self._fleet.devices[here], model, now)
            if here in model.devices and demand.needed_bytes <= place.possible_bytes:
                return self._fleet.devices[here]
        places = [self._place(device, model, now) for device in self._fleet.devices.values()]
        choice = placement.choose(demand, places)
        if choice.device is None:
            self._give_up(model, want, choice.reason, now)
            return None
        if model.runtime.device is not None:
            self._lifecycle.stop(model, now, f"moves: {choice.reason}")
            model.start_wanted = True
            return None
        return self._fleet.devices[choice.device]

    def _give_up(self, model: Model, want: _Want, reason: str, now: float) -> None:
        """It would not fit if everybody else slept."""
        del self._wants[model.name]
        model.start_wanted, model.reason = False, reason
        self._fleet.note(f"{model.name}: cannot be awake ({reason})")
        self._admin.fail(model, reason)
        self._desk.refuse_all(model, "no_room", reason, _NO_ROOM_RETRY_S, now)

    def _demand(self, model: Model, now: float) -> Demand:
        facts, config = model.facts, model.config
        kv_bytes = facts.kv_bytes_per_token if facts is not None else config.kv_bytes_per_token
        return Demand(
            model=model.name,
            weights_bytes=self._fleet.weights_bytes(model),
            needed_bytes=self._fleet.mapped_bytes(model),
            pressure=placement.pressure(model.rate.per_s(now), kv_bytes, config.slo.tpot_s),
            devices=model.devices,
        )

    def _place(self, device: Device, wanting: Model | None, now: float) -> Place:
        """The device without the model that looks for a place."""
        own_bytes = wanting.runtime.charged_bytes if wanting and wanting.runtime.device == device.name else 0
        others = [model for model in device.residents.values() if model is not wanting]
        kept = sum(
            m.runtime.charged_bytes if m.pinned and m.runtime.mapped else self._fleet.asleep_bytes(m)
            for m in others
        )
        idle = [r for r in self._residents(device, wanting) if not r.pinned and not r.busy]
        mapped = [model for model in others if model.runtime.mapped]
        return Place(
            device=device.name,
            budget_bytes=device.budget_bytes,
            free_bytes=device.free_bytes + own_bytes,
            reclaimable_bytes=sum(r.gives_bytes for r in idle),
            possible_bytes=device.budget_bytes - kept,
            awake_weights_bytes=sum(self._fleet.weights_bytes(m) for m in mapped),
            home_weights_bytes=sum(self._fleet.weights_bytes(m) for m in others),
            pressure=sum(self._demand(m, now).pressure for m in mapped),
        )

    def kvpr(self, device: Device, now: float) -> float:
        place = self._place(device, None, now)
        return placement.kvpr(place.pressure, place.budget_bytes - place.awake_weights_bytes)

    def check(self) -> None:
        for name in self._wants:
            assert self._fleet.models[name].runtime.state in (COLD, FAILED, ASLEEP)
        for name, model in self._fleet.models.items():
            waits = self._table.queued(name) and model.runtime.state in (COLD, FAILED, ASLEEP)
            assert not waits or name in self._wants, (
                "a queued request of a sleeping model is wanted by nobody"
            )
