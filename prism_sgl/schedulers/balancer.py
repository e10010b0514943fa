"""Global level at work: when the fleet is looked at, what is seen then, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, replace

from prism_sgl.config import SchedulerConfig
from prism_sgl.schedulers import balance
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.memory_plan import idle_victim_at
from prism_sgl.schedulers.moves import Mover
from prism_sgl.schedulers.pictures import Pictures
from prism_sgl.schedulers.placement import Demand, Place
from prism_sgl.schedulers.records import AWAKE, Device, Model, Role, Runtime
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.sides import Pressure, Serving

# Of a pass: an exchange of two models, or two that leave the most pressed devices.
_MOST_STEPS = 2
# A pass looks at rates over a window; between two of them a twelfth of it has changed (latency.TokenRate).
_PASSES_A_WINDOW = 12
# Until they have been measured.
_FIRST_START_S = 20.0
_FIRST_WAKE_S = 0.5


@dataclass(frozen=True)
class _View:
    """The fleet as one pass sees it."""

    servings: list[Serving]
    places: list[Place]
    kv_unit: float


class Balancer:
    """Owner of the passes: when the next one is, and what the last one found.

    A pass follows requests, at most every twelfth of the window: where nothing was asked since the last one, nothing
    is more pressed than it was.
    """

    def __init__(
        self,
        limits: SchedulerConfig,
        fleet: Fleet,
        table: RequestTable,
        mover: Mover,
        waited_for: Callable[[], Container[str]],
    ) -> None:
        self._limits = limits
        self._fleet = fleet
        self._table = table
        self._mover = mover
        self._waited_for = waited_for  # devices where a model waits for memory: nothing moves there
        self._every_s = limits.window_s / _PASSES_A_WINDOW
        self._pass_at = -math.inf
        self._asked = False
        self._passed_at = -math.inf
        self._found = "no pass yet"

    @property
    def next_at(self) -> float:
        """When the next pass is due; never where there is nowhere to go or nothing was asked."""
        return self._pass_at if self._asked and len(self._fleet.devices) > 1 else math.inf

    def asked(self) -> None:
        """A request came in."""
        self._asked = True

    def run(self, now: float) -> None:
        if now < self.next_at:
            return
        self._pass_at, self._passed_at = now + self._every_s, now
        view = self._view(now)
        verdict = balance.rebalance(
            view.servings,
            view.places,
            view.kv_unit,
            gain=self._limits.min_move_gain,
            most_steps=_MOST_STEPS,
        )
        self._found = verdict.reason
        for step in verdict.steps:
            model = self._fleet.models[step.model]
            if step.kind == "drop":
                self._mover.drop(model, step.source, now, step.reason)
            else:
                role = Role.REPLICA if step.kind == "replica" else Role.INCOMING
                self._mover.begin(model, step.target, now, step.reason, role, step.waits_for)
        # A replica is given up when nothing is asked any more, so those are looked at as long as they are there.
        self._asked = self._mover.has_replicas

    # ------------------------------------------------------------ what is seen

    def pressures(self, now: float) -> dict[str, Pressure]:
        view = self._view(now)
        return balance.pressures(view.servings, view.places, view.kv_unit)

    def _view(self, now: float) -> _View:
        pictures = Pictures(self._fleet, self._table, now, self._limits.sleep_after_s)
        servings: list[Serving] = []
        waited_for = self._waited_for()
        demands: dict[str, Demand] = {}
        places = []
        for device in self._fleet.devices.values():
            settled = self._settled(device, pictures, now)
            free_bytes = 0
            if device.name not in waited_for:
                free_bytes = max(0, device.free_bytes + sum(settled.values()))
            places.append(Place(device.name, device.budget_bytes, free_bytes))
            for runtime in device.residents.values():
                if runtime.mapped and runtime.model.name not in settled and _carries(runtime):
                    servings.append(self._serving(runtime, demands, pictures, now))
        return _View(servings, places, pictures.kv_unit())

    def _settled(self, device: Device, pictures: Pictures, now: float) -> dict[str, int]:
        """Idle models that give their memory to whoever wants it: they are in nobody's way.

        Not those that have a replica, which is to be given up.
        """
        return {
            r.model: r.gives_bytes
            for r in pictures.residents(device)
            if not r.pinned and not r.busy and idle_victim_at(r, self._limits, urgent=False) <= now
            if not device.residents[r.model].model.others
        }

    def _serving(
        self, runtime: Runtime, demands: dict[str, Demand], pictures: Pictures, now: float
    ) -> Serving:
        model = runtime.model
        if (demand := demands.get(model.name)) is None:
            demand = pictures.share(model)
            ends = (Role.LEAVING, Role.SPARE)  # where one leaves or falls asleep none can come
            if left := {r.device for r in model.others if r.role in ends and not r.is_spare}:
                demand = replace(demand, devices=tuple(d for d in demand.devices if d not in left))
            demands[model.name] = demand
        assert runtime.device is not None
        # What its source still answers is computed beside what the target gets.
        both_s = model.answers.typical * model.config.slo.tpot_s
        start_s = (model.last_start_s or _FIRST_START_S) + both_s
        wake_s = (model.last_wake_s or _FIRST_WAKE_S) + both_s
        return Serving(
            demand=demand,
            device=runtime.device,
            stays=self._stays(runtime, demand, now),
            cost=demand.compute * start_s / self._limits.window_s,
            near=next((r.device for r in model.others if r.is_spare and r.device is not None), ""),
            near_cost=demand.compute * wake_s / self._limits.window_s,
            priority=model.config.priority,
        )

    def _stays(self, runtime: Runtime, demand: Demand, now: float) -> str:
        """Why it is not moved whatever the pressures are; empty if it may be."""
        model = runtime.model
        if model.pinned:
            return "it is pinned"
        for each in (runtime, model.runtime):  # a home that was set aside may sleep while a replica serves
            if each.state is not AWAKE:
                return f"it is {each.state} on {each.device}"
        if (target := self._mover.target(model)) is not None:
            return f"it is on its way to {target}"
        if (until := self._mover.rests_until(model, now)) > now:
            return f"it stays {until - now:.0f} s more after its last move, or the last try"
        if (left_s := runtime.awake_since + self._limits.min_residence_s - now) > 0:
            return f"it woke a moment ago and stays {left_s:.1f} s more"
        if (
            demand.pressure <= 0 and demand.compute <= 0 and not model.others
        ):  # a replica is given up all the same
            return "nothing is asked of it"
        return ""

    # ------------------------------------------------------------ in words

    def explain(self, model: Model, now: float) -> str:
        """Where it is and why, all devices as seen now, and what would have to change to move it."""
        view = self._view(now)
        where = ", ".join(
            f"{r.state} on {r.device}" + ("" if r.role is Role.HOME else f" ({r.role.value})")
            for r in model.runtimes
            if r.device is not None
        )
        lines = [f"{model.name}: {where or model.runtime.state} ({model.reason or 'not loaded yet'})"]
        share = Pictures(self._fleet, self._table, now, self._limits.sleep_after_s).share(model)
        lines.append(
            f"it asks for {share.compute:.3f} of a device's time and {model.rate.per_s(now):.1f} tokens/s of KV"
            + (f" on each of {len(model.serving)} devices" if len(model.serving) > 1 else "")
        )
        lines += balance.explain(
            model.name, view.servings, view.places, view.kv_unit, gain=self._limits.min_move_gain
        )
        lines.append(self._would_move(model, share, now))
        return "\n".join(lines)

    def _would_move(self, model: Model, share: Demand, now: float) -> str:
        ago = f"last pass {now - self._passed_at:.0f} s ago: {self._found}"
        if len(self._fleet.devices) < 2:
            return "there is one device: it can't move"
        if len(model.devices) < 2:
            return f"it may be on {', '.join(model.devices) or 'no device'} only: it can't move"
        if self._passed_at == -math.inf:
            ago = self._found
        if model.runtime.device is None:
            return f"it goes where the pressure is smallest when it starts; {ago}"
        if stays := self._stays(model.runtime, share, now):
            return f"it does not move: {stays}; {ago}"
        gain = self._limits.min_move_gain
        bar = f"{gain:.0%} and what its start costs, beyond chance"
        return f"it moves if that lowers the largest pressure by {bar}; {ago}"


def _carries(runtime: Runtime) -> bool:
    """What is asked of a model that moves is on its target already."""
    if runtime.role is Role.HOME:
        return runtime.model.incoming is None
    return runtime.role in (Role.REPLICA, Role.INCOMING)
