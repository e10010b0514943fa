"""What a device is pressed by, while steps are tried on a picture of the fleet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prism_sgl.schedulers.placement import Demand, Place, kv_asked

# Sums of what is asked go up and down by floats; less than this is nothing.
_NOTHING = 1e-6
# Standard errors: what is left to chance then is one in forty.
_SURE = 2.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A runtime, with the share of its model's demand that it carries."""

    demand: Demand
    device: str
    stays: str = ""  # why it may not be moved; empty: it may
    cost: float = 0.0  # of a move: compute that its start takes, over the time in which it has to pay
    near: str = ""  # a device where it only has to wake
    near_cost: float = 0.0
    priority: int = 0

    def cost_to(self, device: str) -> float:
        return self.near_cost if device == self.near else self.cost


@dataclass(frozen=True, slots=True)
class Pressure:
    """Parts of what a device has: of its KV memory, and of its time."""

    kv: float
    compute: float

    @property
    def largest(self) -> float:
        return max(self.kv, self.compute)

    def __str__(self) -> str:
        return f"{number(self.largest)} (KV {number(self.kv)}, compute {number(self.compute)})"


@dataclass(frozen=True, slots=True)
class Step:
    """``kind``: "move", "replica" (the source goes on serving) or "drop" (of the runtime on the source)."""

    kind: str
    model: str
    source: str
    target: str
    reason: str
    waits_for: str = ""  # a model that has to leave the target first
    part: int = 0


@dataclass(slots=True)
class Side:
    """A device with all that serves there, while steps are tried."""

    place: Place
    kv_unit: float
    there: dict[tuple[str, int], Serving] = field(default_factory=dict)
    pressure: float = 0.0
    compute: float = 0.0
    weights_bytes: int = 0
    variance: float = 0.0  # of its pressure as estimated
    free_bytes: int = 0  # a source gives nothing back before its target is awake: only takes count here

    def add_up(self) -> None:
        demands = [serving.demand for serving in self.there.values()]
        self.pressure = self.place.pressure + math.fsum(d.pressure for d in demands)
        self.compute = self.place.compute + math.fsum(d.compute for d in demands)
        self.weights_bytes = self.place.awake_weights_bytes + sum(d.weights_bytes for d in demands)
        self.variance = math.fsum(map(self.variance_of, demands))

    def variance_of(self, demand: Demand) -> float:
        """What is uncertain of its part of the pressure."""
        kv = kv_asked(self.kv_unit, demand.pressure, self.place.budget_bytes - self.weights_bytes)
        share = max(demand.compute, kv) if kv < math.inf else demand.compute
        return (demand.noise * share) ** 2

    def value(self, plus: Demand | None = None, minus: Demand | None = None) -> Pressure:
        pressure, compute, weights = self.pressure, self.compute, self.weights_bytes
        if plus is not None:
            pressure, compute, weights = (
                pressure + plus.pressure,
                compute + plus.compute,
                weights + plus.weights_bytes,
            )
        if minus is not None:
            pressure, compute, weights = (
                pressure - minus.pressure,
                compute - minus.compute,
                weights - minus.weights_bytes,
            )
        pressure = pressure if pressure > _NOTHING else 0.0
        return Pressure(
            kv_asked(self.kv_unit, pressure, self.place.budget_bytes - weights), max(0.0, compute)
        )

    def may_take(self, demand: Demand) -> bool:
        name = self.place.device
        return name in demand.devices and all(model != demand.model for model, _ in self.there)


def sides_of(servings: Iterable[Serving], places: Sequence[Place], kv_unit: float) -> dict[str, Side]:
    sides = {place.device: Side(place, kv_unit, free_bytes=place.free_bytes) for place in places}
    for serving in servings:
        sides[serving.device].there[serving.demand.model, serving.demand.part] = serving
    for side in sides.values():
        side.add_up()
    return sides


@dataclass(frozen=True, slots=True)
class Bar:
    """What the two devices of a step may be pressed by after it, the step's cost included, for it to be worth it.

    Less than the source now by ``gain`` of that, and by more than may be chance. What the step takes off the source is
    as uncertain as the models that move; what the target stays below is as uncertain as those that do not, because what
    moves is the same on both sides.
    """

    source: float
    target: float

    @classmethod
    def of(cls, source: Side, target: Side, moved: Iterable[Demand], gain: float) -> Bar:
        now = source.value().largest
        of_moved = math.fsum(source.variance_of(demand) for demand in moved)
        of_rest = max(0.0, source.variance + target.variance - of_moved)
        return cls(below(now, gain, of_moved), below(now, gain, of_rest))

    def passes(self, here: float, there: float, cost: float) -> bool:
        return here + cost <= self.source and there + cost <= self.target


def below(now: float, gain: float, variance: float) -> float:
    """Less than this is less by the gain, and not by chance."""
    return now - max(gain * now, _SURE * math.sqrt(variance)) if now < math.inf else math.inf


def number(value: float) -> str:
    return "inf" if value == math.inf else f"{value:.2f}"
