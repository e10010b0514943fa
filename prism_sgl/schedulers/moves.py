"""Moves under way: target first, the source serves until the target is awake, then drains and is stopped.

1. room is made on the target device, of what is free and what settled idle models give; nobody busy gives for a move;
2. a runtime starts there, or wakes if the model's spare sleeps there (``Role.INCOMING``); the source goes on serving;
3. it is awake: it is the model's home, and all new grants go there; the source is leaving;
4. the source has answered what it had, or its deadline is over: it is stopped, or sleeps as the model's spare.

A model may also move while it sleeps: requests wait for it, and where it sleeps nobody can give (``seek``).

If the target does not come up, the source has never stopped serving; the model stays where it is for a while. If the
source dies, the target becomes the home at once, and what is queued waits for it (supervisor.py). A router that starts
anew knows nothing of moves: it finds two runtimes, and the rule for adoption ends at step 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from prism_sgl.config import SchedulerConfig
from prism_sgl.messages import RuntimeId, RuntimeState
from prism_sgl.schedulers import placement
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.memory_plan import Verdict, find_room, idle_victim_at
from prism_sgl.schedulers.pictures import Pictures, demand
from prism_sgl.schedulers.records import ASLEEP, AWAKE, DRAINING, STOPPING, Device, Model, Role, Runtime

# A model that has moved stays for this part of the window: what is measured of it is then mostly of its new place.
_COOL_DOWN = 0.5
# One whose target did not come up waits so many times as long.
_FAILED = 4
# Room that idle models give comes in less than a second; memory of a stopped process takes longer to return.
_ROOM_WAIT_S = 15.0
# To look at all devices for one model takes milliseconds in a large fleet; in vain, all wait for so long.
_SEEK_EVERY_S = 1.0


@dataclass
class _Move:
    device: str
    role: Role  # INCOMING, or REPLICA: the source stays
    why: str
    since: float
    source: RuntimeState  # of the home when it began: in another one before a runtime starts it has lost its reason
    waits_for: str = ""  # a model that leaves the device first
    runtime: RuntimeId | None = None  # None: room is being made


class Mover:
    """Owner of the moves under way, and of when each model may move again."""

    def __init__(self, limits: SchedulerConfig, fleet: Fleet, lifecycle: Lifecycle) -> None:
        self._limits = limits
        self._cool_down_s = limits.window_s * _COOL_DOWN
        self._fleet = fleet
        self._lifecycle = lifecycle
        self._moves: dict[str, _Move] = {}
        self._rests_until: dict[str, float] = {}
        self._why_given_up: dict[str, str] = {}  # of each model's last move, if it came to nothing
        self._sought = (-math.inf, 0)  # until then no device is looked for, for those who need as much
        self._spareless = dict.fromkeys(fleet.models)  # may have no spare
        self.has_news = False  # a move waits to be looked at

    # ------------------------------------------------------------ reading

    def target(self, model: Model) -> str | None:
        """The device where a runtime of it is coming up, or will be."""
        if (move := self._moves.get(model.name)) is not None:
            return move.device
        incoming = model.incoming
        return None if incoming is None else incoming.device

    @property
    def has_replicas(self) -> bool:
        """A model has one, or one is coming."""
        return any(move.role is Role.REPLICA for move in self._moves.values()) or any(
            runtime.role is Role.REPLICA for model in self._fleet.models.values() for runtime in model.others
        )

    def rests_until(self, model: Model, now: float) -> float:
        """Not moved before; 0 if it may move."""
        until = self._rests_until.get(model.name, 0.0)
        if until <= now:
            self._rests_until.pop(model.name, None)
            return 0.0
        return until

    def why_given_up(self, model: Model) -> str:
        """Of its last move; "" if none was, or it is not over."""
        return self._why_given_up.get(model.name, "")

    def refusal(self, model: Model, device: str) -> str | None:
        """Why this model can't move there now, whatever it would be good for."""
        if device not in self._fleet.devices:
            return f"can't move to {device}: no such device"
        if device not in model.devices:
            return f"may not be placed on {device}"
        there = self._fleet.devices[device].residents.get(model.name)
        if there is not None and not there.is_spare:
            return f"has a runtime on {device}"
        if model.runtime.state is not AWAKE:
            return f"is {model.runtime.state}; one that is awake can move"
        if (target := self.target(model)) is not None:
            return f"is moving to {target}"
        return None

    # ------------------------------------------------------------ moving

    def begin(
        self,
        model: Model,
        device: str,
        now: float,
        why: str,
        role: Role = Role.INCOMING,
        waits_for: str = "",
    ) -> None:
        assert model.runtime.state is ASLEEP or self.refusal(model, device) is None
        self._moves[model.name] = _Move(device, role, why, now, model.runtime.state, waits_for)
        self._why_given_up.pop(model.name, None)
        self.has_news = True
        verb = "gets a replica on" if role is Role.REPLICA else "moves to"
        self._fleet.note(f"{model.name}: {verb} {device} ({why})")

    def seek(
        self,
        model: Model,
        needed_bytes: int,
        pictures: Pictures,
        waited_for: Callable[[], Container[str]],
        now: float,
    ) -> float:
        """It sleeps, requests wait, and nobody there can give: it moves where there is room that nobody waits for.

        As for any move, room is what is free and what settled models give. The home goes on waiting for its turn, and
        whichever is awake first serves. Returns when to ask again if nothing was found; never if it can't move.
        """
        if model.runtime.state is not ASLEEP or model.others or model.name in self._moves:
            return math.inf
        if self._lifecycle.is_set_aside(model.runtime) or len(model.devices) < 2:
            return math.inf
        if rests_until := self.rests_until(model, now):
            return rests_until
        until, too_many_bytes = self._sought
        if now < until and needed_bytes >= too_many_bytes:
            return until
        avoided = waited_for()
        places = [
            replace(
                pictures.place(device),
                free_bytes=self._free_bytes(device, pictures, now),
                reclaimable_bytes=0,
                possible_bytes=0,
            )
            for name, device in self._fleet.devices.items()
            if name not in avoided
        ]
        choice = placement.choose(demand(model, self._fleet, now), places, pictures.kv_unit())
        if choice.device is None:
            self._sought = (now + _SEEK_EVERY_S, needed_bytes)
            return now + _SEEK_EVERY_S
        self.begin(model, choice.device, now, f"{model.runtime.device} has no room; {choice.reason}")
        return math.inf

    def _free_bytes(self, device: Device, pictures: Pictures, now: float) -> int:
        """What nobody was promised, and what settled idle models would give."""
        gives = (
            r.gives_bytes
            for r in pictures.residents(device)
            if not r.pinned and not r.busy and idle_victim_at(r, self._limits, urgent=False) <= now
        )
        return max(0, pictures.tally(device).free_bytes) + sum(gives)

    def drop(self, model: Model, device: str, now: float, why: str) -> None:
        """One of several runtimes that serve it is no longer needed."""
        runtime = self._fleet.devices[device].residents[model.name]
        if runtime is model.runtime:
            heir = next(r for r in model.serving if r is not runtime)
            self._fleet.make_home(heir, why)
        self._lifecycle.retire(runtime, now, why, keep=self._limits.spares)
        self._rests_until[model.name] = now + self._cool_down_s

    def make_room(self, pictures: Pictures, now: float) -> None:
        """Start what has its room. Comes after all who want to be awake: they have claimed theirs."""
        self.has_news = False
        for name, move in list(self._moves.items()):
            if move.runtime is not None:
                continue
            model, device = self._fleet.models[name], self._fleet.devices[move.device]
            if self._is_waited_for(move, device):
                move.since = now
                continue
            if now - move.since > _ROOM_WAIT_S:
                self._give_up(model, f"no room on {move.device} in {_ROOM_WAIT_S:.0f} s", now)
                continue
            spare = device.residents.get(name)
            starts = spare is None or not spare.is_spare
            if starts and self._fleet.num_starting >= self._limits.start_parallel:
                continue
            needed_bytes = self._fleet.mapped_bytes(model)
            needed_bytes -= spare.charged_bytes if spare is not None else 0
            residents = [r for r in pictures.residents(device) if r.model != name]
            tally = pictures.tally(device)
            room = find_room(needed_bytes, tally, residents, now, self._limits, urgent=False, waits_since=now)
            if room.verdict is Verdict.NOW and spare is not None:
                self._fleet.set_role(spare, move.role)
                self._lifecycle.wake(spare, now, move.why)
                move.runtime = spare.id
            elif room.verdict is Verdict.NOW:
                move.runtime = self._lifecycle.start(model, device, now, move.why, move.role)
            elif room.verdict is Verdict.BLOCKED:
                self._give_up(model, f"no room on {move.device}", now)
            for victim in room.sleep:
                why = f"{model.name} moves to {device.name}"
                self._lifecycle.give_way(device.residents[victim], now, why)
            pictures.changed(device.name)

    def _is_waited_for(self, move: _Move, device: Device) -> bool:
        """The other one of an exchange is still there, and on its way."""
        other = device.residents.get(move.waits_for)
        return other is not None and (other.role is Role.LEAVING or self.target(other.model) is not None)

    def settle(self, model: Model, now: float) -> None:
        """Follow up what has happened to a model's runtimes."""
        incoming = model.incoming
        if incoming is not None and incoming.state is AWAKE:
            if self._lifecycle.is_set_aside(model.runtime):
                # What it had in flight goes on where it was, after its next turn there.
                self._lifecycle.retire(
                    incoming, now, "the home fell asleep with requests", keep=self._limits.spares
                )
            elif model.runtime.sleep_sent_at is None:
                self._switch(model, now)
        elif incoming is not None and incoming.state is ASLEEP:
            self._keep_asleep(incoming, now)
        for runtime in model.others:
            if runtime.role is Role.REPLICA and runtime.state is ASLEEP:
                self._keep_asleep(runtime, now)
        home = model.runtime
        gives_way = home.state in (DRAINING, ASLEEP) and not self._lifecycle.takes_requests_along(home)
        if gives_way and (replica := next(iter(model.serving), None)) is not None:
            self._fleet.make_home(replica, f"the runtime on {home.device} gave way")
            self._lifecycle.retire(home, now, "gave way, another one serves", keep=self._limits.spares)
        if model.spare is None:
            self._spareless[model.name] = None
        move = self._moves.get(model.name)
        if move is None:
            return
        if move.runtime is None:
            if (refusal := self._lost_its_reason(model, move)) is not None:
                self._give_up(model, refusal, now)
            return
        came = self._fleet.by_id(move.runtime)
        if came is None or came.role not in (move.role, Role.HOME) or came.state is STOPPING:
            self._give_up(model, f"the runtime on {move.device} did not come up", now)
        elif move.role is Role.SPARE and (came.role is Role.HOME or came.state is ASLEEP):
            del self._moves[model.name]
        elif came.role is Role.HOME or (came.role is Role.REPLICA and came.state is AWAKE):
            del self._moves[model.name]
            self._rests_until[model.name] = now + self._cool_down_s

    def _lost_its_reason(self, model: Model, move: _Move) -> str | None:
        if model.runtime.state is not move.source:
            return f"it is {model.runtime.state}"
        there = self._fleet.devices[move.device].residents.get(model.name)
        return None if there is None or there.is_spare else f"it is on {move.device}"

    def _keep_asleep(self, runtime: Runtime, now: float) -> None:
        """It sleeps, and is not the home: what an earlier router kept, or one that found no memory to wake."""
        is_kept = self._limits.spares and not self._lifecycle.is_set_aside(runtime)
        if is_kept and runtime.model.spare is None:
            self._fleet.set_role(runtime, Role.SPARE)
        else:
            self._lifecycle.retire(runtime, now, "sleeps, and is not kept")

    def start_spare(self, pictures: Pictures, now: float) -> float:
        """One at a time, where all is calm and a device has room for it awake: it starts, and sleeps at once.

        Room that no requests will take for their KV: else it would be stopped and started as long as the load lasts.
        Returns when to ask again, if that is all that was in the way.
        """
        look_at = math.inf
        if self._fleet.num_starting or any(move.role is Role.SPARE for move in self._moves.values()):
            return look_at
        for name in list(self._spareless):
            model = self._fleet.models[name]
            if model.spare is not None or len(model.devices) < 2:
                del self._spareless[name]
                continue
            is_up = model.runtime.state in (AWAKE, ASLEEP) and model.runtime.known
            if not is_up or model.others or name in self._moves or self.rests_until(model, now):
                continue
            its = demand(model, self._fleet, now)
            roomy = [
                device
                for device in self._fleet.devices.values()
                if device.name in model.devices
                and name not in device.residents
                and pictures.tally(device).free_bytes >= its.needed_bytes
            ]
            places = [
                replace(pictures.place(device), reclaimable_bytes=0, possible_bytes=0)
                for device in roomy
                if pictures.tally(device).free_bytes - device.wanted_kv_bytes >= its.needed_bytes
            ]
            if len(places) < len(roomy):
                look_at = now + self._limits.window_s
            choice = placement.choose(its, places, pictures.kv_unit())
            if choice.device is not None:
                device = self._fleet.devices[choice.device]
                why = "shall sleep on a second device"
                runtime = self._lifecycle.start(model, device, now, why, Role.SPARE)
                state = model.runtime.state
                self._moves[name] = _Move(device.name, Role.SPARE, why, now, state, runtime=runtime)
                pictures.changed(device.name)
                break
        return look_at

    def _switch(self, model: Model, now: float) -> None:
        incoming, source = model.incoming, model.runtime
        assert incoming is not None
        move = self._moves.get(model.name)
        why = move.why if move is not None else "a move that an earlier router began"
        self._fleet.make_home(incoming, why)
        model.moves += 1
        if source.id is not None:
            why = f"moved to {incoming.device}: {why}"
            self._lifecycle.retire(source, now, why, keep=self._limits.spares)

    def _give_up(self, model: Model, why: str, now: float) -> None:
        move = self._moves.pop(model.name)
        self._why_given_up[model.name] = why
        wait_s = self._cool_down_s * (1 if move.runtime is None else _FAILED)
        self._rests_until[model.name] = now + wait_s
        self._fleet.touch(model)
        wish = "get a runtime on" if move.role is not Role.INCOMING else "move to"
        self._fleet.note(f"{model.name}: does not {wish} {move.device} ({why}); stays for {wait_s:.0f} s")

    def check(self) -> None:
        for name, move in self._moves.items():
            model = self._fleet.models[name]
            runtime = self._fleet.by_id(move.runtime)
            assert move.runtime is None or (runtime is not None and runtime.role is move.role)
            assert model.runtime.id != move.runtime or move.runtime is None
