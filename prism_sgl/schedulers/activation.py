"""Which models shall be awake, and the room that is made for them.

A *want* is a model that shall be awake and is not. Wants are served in a fixed order (requests before preloads,
then who wants longest), and one that waits for memory claims what is free or coming on its device before the
next one is looked at; so a small model cannot for ever take the bytes that a big one waits for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prism_sgl.config import Config
from prism_sgl.schedulers import placement
from prism_sgl.schedulers.admin import AdminDesk
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.grants import Shortage
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.memory_plan import Room, Verdict, find_room, idle_victim_at, kv_victims
from prism_sgl.schedulers.moves import Mover
from prism_sgl.schedulers.pictures import Pictures, demand, is_busy
from prism_sgl.schedulers.placement import Choice
from prism_sgl.schedulers.records import ASLEEP, AWAKE, COLD, DRAINING, FAILED, Device, Model, Role, Runtime
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.requests import RequestDesk
from prism_sgl.schedulers.supervisor import SupervisorDesk
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
    ) -> None:
        self._limits = config.scheduler
        self._fleet = fleet
        self._table = table
        self._desk = desk
        self._lifecycle = lifecycle
        self._supervisor = supervisor
        self._admin = admin
        self._mover = mover
        self._wants: dict[str, _Want] = {}
        self._retries: dict[str, float] = {}  # models that could not load, and when they are tried again
        self._turns: dict[str, str] = {}  # model that drains -> model that it drains for
        self._look_at = math.inf
        self._short: dict[str, Shortage] = {}  # devices that lack KV
        self._kv_look_at = math.inf
        self._dirty = False
        self._moves_seen = 0

    @property
    def next_at(self) -> float:
        """When time alone may change something."""
        return min(self._look_at, self._kv_look_at, min(self._retries.values(), default=math.inf))

    def waited_for(self) -> set[str]:
        """Devices where somebody waits for memory."""
        devices = (
            self._fleet.models[name].runtime.device or want.device for name, want in self._wants.items()
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
        urgent = (
            bool(self._table.queued(model.name))
            or self._admin.wants_awake(model)
            or self._lifecycle.is_set_aside(model.runtime)
        )
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
        if state is AWAKE and (self._wants or self._turns) and not is_busy(model.runtime, self._table):
            self._dirty = True

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
                self._settle_excess(device, seen)
        ordered = sorted(self._wants.items(), key=lambda w: (not w[1].urgent, w[1].since))
        for name, want in ordered:
            self._serve(self._fleet.models[name], want, seen)
        self._mover.make_room(seen.pictures, now)
        if self._limits.spares and not self._wants:
            self._mover.start_spare(seen.pictures, now)
        self._follow_turns(now)

    def _serve(self, model: Model, want: _Want, seen: _Pass) -> None:
        if seen.now < model.not_before:
            self._look_at = min(self._look_at, model.not_before)
            return
        start = model.runtime.state is not ASLEEP
        if start and self._fleet.num_starting >= self._limits.start_parallel:
            return  # the end of a start is a move, which leads here again
        device = self._device_for(model, want, seen)
        if device is None or device.name in seen.blocked:
            return
        needed_bytes = self._fleet.mapped_bytes(model) - model.runtime.charged_bytes
        overdue = want.urgent and seen.now >= want.since + self._limits.max_wait_s
        if not overdue and needed_bytes >= seen.too_much.get((device.name, want.urgent), math.inf):
            return  # less than this was not to be had a moment ago, and who asked came first
        room = find_room(
            needed_bytes,
            seen.pictures.tally(device),
            seen.pictures.residents(device),
            seen.now,
            self._limits,
            urgent=want.urgent,
            waits_since=want.since,
        )
        self._look_at = min(self._look_at, room.look_at)
        if room.verdict is Verdict.BLOCKED:
            if want.urgent:
                again_at = self._mover.seek(model, needed_bytes, seen.pictures, self.waited_for, seen.now)
                self._look_at = min(self._look_at, again_at)
            if overdue:
                seen.blocked.add(device.name)  # its turn is due: nobody behind it takes what comes free
            seen.too_much[device.name, want.urgent] = needed_bytes
            return
        if room.verdict is Verdict.NOW:
            self._activate(model, want, device, seen)
        else:
            want.device = device.name
            self._take(room, device, model, needed_bytes, seen.now)
        seen.pictures.changed(device.name)

    def _activate(self, model: Model, want: _Want, device: Device, seen: _Pass) -> None:
        del self._wants[model.name]
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
        self._lifecycle.wake(model.runtime, seen.now, why)

    def _take(self, room: Room, device: Device, wanting: Model, needed_bytes: int, now: float) -> None:
        wish = f"{wanting.name} wants {show_size(needed_bytes)}"
        for name in room.sleep:
            idle_s = now - device.residents[name].idle_since
            self._lifecycle.give_way(device.residents[name], now, f"idle {idle_s:.0f} s, {wish}")
        for name in room.drain:
            runtime = device.residents[name]
            if runtime.role is Role.HOME:
                self._turns[name] = wanting.name
            # Its answers have as long to end as the other has waited; then they wait for its next turn.
            preempt_at = now + self._limits.max_wait_s
            self._lifecycle.give_way(runtime, now, f"{wish} and has waited its time", preempt_at=preempt_at)

    def _follow_turns(self, now: float) -> None:
        for victim, wanting in list(self._turns.items()):
            model = self._fleet.models[victim]
            runtime = model.runtime
            if runtime.state is not DRAINING or runtime.sleep_sent_at is not None:
                del self._turns[victim]
            elif wanting not in self._wants:
                del self._turns[victim]
                self._lifecycle.call_off_drain(runtime, now)
            elif now >= runtime.preempt_at:
                self._lifecycle.settle(model, now)
            else:
                self._look_at = min(self._look_at, runtime.preempt_at)

    # ------------------------------------------------------------ memory of others

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

    def _settle_excess(self, device: Device, seen: _Pass) -> None:
        """Facts turned out larger than the files told: idle models give until the account is even."""
        if any(r.adopted and not r.known for r in device.residents.values()):
            return  # charged as if awake until its Hello, so the excess may be none
        room = find_room(
            0,
            seen.pictures.tally(device),
            seen.pictures.residents(device),
            seen.now,
            self._limits,
            urgent=True,
            waits_since=math.inf,
        )
        self._look_at = min(self._look_at, room.look_at)
        for name in room.sleep:
            self._lifecycle.give_way(
                device.residents[name], seen.now, f"{device.name} promised more than it has"
            )
        seen.pictures.changed(device.name)

    # ------------------------------------------------------------ where

    def _device_for(self, model: Model, want: _Want, seen: _Pass) -> Device | None:
        """Where it sleeps, or where placement puts it; None if it can be awake nowhere, or moves first."""
        spare = model.spare if model.runtime.state is ASLEEP else None
        # What a model keeps asleep counts as the home's on one device and as a spare's on the other: near the edge of
        # what fits each looks better from the other one, so it is asked now and then only, or they would swap for ever.
        if spare is not None and spare.is_spare and seen.now >= want.chosen_at + self._limits.min_residence_s:
            want.chosen_at = seen.now
            self._wake_where_best(model, spare, seen)
        here = model.runtime.device or want.device
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
        del self._wants[model.name]
        model.start_wanted, model.reason = False, reason
        self._fleet.note(f"{model.name}: cannot be awake ({reason})")
        self._admin.fail(model, reason)
        self._desk.refuse_all(model, "no_room", reason, _NO_ROOM_RETRY_S, now)

    def kvpr(self, device: Device, now: float) -> float:
        place = Pictures(self._fleet, self._table, now, self._limits.sleep_after_s).place(device)
        return placement.kvpr(place.pressure, place.budget_bytes - place.awake_weights_bytes)

    def check(self) -> None:
        for name in self._wants:
            assert self._fleet.models[name].runtime.state in (COLD, FAILED, ASLEEP)
        for name, model in self._fleet.models.items():
            held = self._table.queued(name) or self._table.running(model.runtime.id)
            waits = held and model.runtime.state in (COLD, FAILED, ASLEEP)
            assert not waits or name in self._wants, "a request of a sleeping model is wanted by nobody"
