"""Global level: on which device a model is started, and what a device is pressed by.

KVPR (KV pressure ratio, Prism section 6.1): w_j = token rate x KV bytes a token / TPOT SLO of model j, and
KVPR_i = sum of w_j / (budget_i - sum of weights_j) over the models awake on device i. A model goes where the
*resulting* ratio is smallest: the paper's text says so, its pseudo-code takes the ratio before the model is added
and has no fit test (Algorithm 1).

KVPR knows nothing of compute: where all models are busy it puts those side by side that need it most. So a
device has two pressures, and the larger one counts. Both are parts of what it has: compute is seconds asked a second
(load.py); KVPR is multiplied by ``kv_unit`` (seconds squared), so that it is bytes asked over bytes there are.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from prism_sgl.units import show_size

_BISECTIONS = 12


@dataclass(frozen=True, slots=True)
class Demand:
    """A model, or one part of a model of several, that looks for a device.

    ``needed_bytes`` = weights + floor of KV + overhead. Parts of one model (same name) never share a device.
    """

    model: str
    weights_bytes: int
    needed_bytes: int
    pressure: float  # w_j
    devices: tuple[str, ...]  # where it may go
    compute: float = 0.0  # seconds of a device, a second
    part: int = 0
    noise: float = 0.0  # relative standard error of pressure and compute
    reads: float = 0.0  # bytes of weights a second, if it decodes as fast as promised


@dataclass(frozen=True, slots=True)
class Place:
    """A device as placement sees it."""

    device: str
    budget_bytes: int
    free_bytes: int  # promised to nobody
    reclaimable_bytes: int = 0  # what idle models would give back now
    possible_bytes: int = 0  # what all but the pinned ones would give back some time
    awake_weights_bytes: int = 0
    home_weights_bytes: int = 0  # of all models whose runtime is there, asleep ones too
    pressure: float = 0.0
    compute: float = 0.0
    home_reads: float = 0.0  # as home_weights_bytes


@dataclass(frozen=True)
class Choice:
    device: str | None
    reason: str


def pressure(token_rate: float, kv_bytes_per_token: int, tpot_s: float) -> float:
    """w_j: bytes of KV that a model asks for a second, the more the tighter its time for each token is."""
    return token_rate * kv_bytes_per_token / tpot_s


def kvpr(pressure: float, shared_bytes: int) -> float:
    if shared_bytes <= 0:
        return math.inf if pressure > 0 else 0.0
    return pressure / shared_bytes


def kv_asked(kv_unit: float, pressure: float, shared_bytes: int) -> float:
    """The part of a device's KV memory that is asked for: KVPR times the unit."""
    return kvpr(kv_unit * pressure, shared_bytes)


def choose(demand: Demand, places: Iterable[Place], kv_unit: float = 1.0) -> Choice:
    """The device for one model: smallest resulting pressure among those where it fits.

    It fits where there is room now or idle models would make it; failing that, where there would be room if
    all but the pinned ones slept. Equal pressures (nothing is asked of anybody yet) go where fewer weights have
    their home, or all models would start on the first device.
    """
    allowed = [place for place in places if place.device in demand.devices]
    for fits in (_fits_soon, _fits_some_time):
        fitting = [place for place in allowed if fits(demand, place)]
        if fitting:
            best = min(fitting, key=lambda place: _rank(demand, place, kv_unit))
            least = _resulting(demand, best, kv_unit)
            if math.isinf(least):  # not all of its models have room awake at once
                return Choice(best.device, f"{best.device} has room, its models take turns")
            return Choice(best.device, f"{best.device} has the smallest pressure ({least:.3g})")
    if not allowed:
        return Choice(None, f"{demand.model} may be placed on no device")
    most = max(allowed, key=lambda place: place.possible_bytes)
    return Choice(
        None,
        f"{demand.model} needs {show_size(demand.needed_bytes)}, and {most.device} can give "
        f"{show_size(max(0, most.possible_bytes))} at most: the rest is pinned or held by sleeping models",
    )


def _fits_soon(demand: Demand, place: Place) -> bool:
    return demand.needed_bytes <= place.free_bytes + place.reclaimable_bytes


def _fits_some_time(demand: Demand, place: Place) -> bool:
    return demand.needed_bytes <= place.possible_bytes


def _resulting(demand: Demand, place: Place, kv_unit: float) -> float:
    shared = place.budget_bytes - place.awake_weights_bytes - demand.weights_bytes
    return max(kv_asked(kv_unit, place.pressure + demand.pressure, shared), place.compute + demand.compute)


def _rank(demand: Demand, place: Place, kv_unit: float) -> tuple[float, float, int]:
    home = (place.home_weights_bytes + demand.weights_bytes) / max(1, place.budget_bytes)
    return (_resulting(demand, place, kv_unit), home, -place.free_bytes)


# ---------------------------------------------------------------- many at once


@dataclass(slots=True)
class _Bin:
    """A device that is being filled."""

    place: Place
    number: int
    pressure: float
    compute: float
    weights_bytes: int
    home_bytes: int
    free_bytes: int
    models: set[str] = field(default_factory=set)

    def with_(self, demand: Demand, kv_unit: float) -> float:
        """Its pressure with this one."""
        shared = self.place.budget_bytes - self.weights_bytes - demand.weights_bytes
        return max(kv_asked(kv_unit, self.pressure + demand.pressure, shared), self.compute + demand.compute)

    def key(self, limit: float, kv_unit: float) -> tuple[float, float, int, int]:
        """How full it is if no pressure shall exceed the limit: KVPR <= K is the same as W + K S <= K C."""
        budget = max(1, self.place.budget_bytes)
        full = self.weights_bytes / budget
        if 0.0 < limit < math.inf:
            full = max(full + kv_unit * self.pressure / (limit * budget), self.compute / limit)
        return (full, self.home_bytes / budget, -self.free_bytes, self.number)

    def take(self, demand: Demand) -> None:
        self.pressure += demand.pressure
        self.compute += demand.compute
        self.weights_bytes += demand.weights_bytes
        self.home_bytes += demand.weights_bytes
        self.free_bytes -= demand.needed_bytes
        self.models.add(demand.model)


@dataclass(frozen=True)
class Packing:
    """Devices by number of demand, and the largest pressure of all devices."""

    devices: tuple[str | None, ...]
    largest: float

    @property
    def num_placed(self) -> int:
        return sum(device is not None for device in self.devices)


def pack(demands: Sequence[Demand], places: Sequence[Place], kv_unit: float = 1.0) -> Packing:
    """Smallest largest pressure, by bisection: for a limit, fill the emptiest device first, largest demands first.

    Only free room counts: all that have a device can be awake at the same time. What does not fit has none; nothing is
    left out for the sake of a lower pressure. Never worse than Algorithm 1 with the resulting ratio and a fit test.
    """
    best = _pack(demands, places, kv_unit, math.inf)
    greedy = _pack(demands, places, kv_unit, 0.0)
    assert best is not None
    assert greedy is not None
    if (greedy.num_placed, -greedy.largest) > (best.num_placed, -best.largest):
        best = greedy
    low, high = _least(demands, places, kv_unit), best.largest
    for _ in range(_BISECTIONS):
        if not low < high * 0.99:
            break
        limit = (low + high) / 2 if high < math.inf else max(1.0, low * 2)
        packing = _pack(demands, places, kv_unit, limit, strict=True)
        if packing is not None and packing.num_placed >= best.num_placed:
            best, high = packing, min(limit, packing.largest)
        else:
            low = limit
    return best


def _least(demands: Sequence[Demand], places: Sequence[Place], kv_unit: float) -> float:
    """No placement has a smaller largest pressure: all of it, cut as one likes, over all devices."""
    if not places:
        return 0.0
    shared = sum(p.budget_bytes - p.awake_weights_bytes for p in places) - sum(
        d.weights_bytes for d in demands
    )
    pressures = math.fsum(p.pressure for p in places) + math.fsum(d.pressure for d in demands)
    compute = math.fsum(p.compute for p in places) + math.fsum(d.compute for d in demands)
    kv = kv_unit * pressures / shared if shared > 0 else 0.0
    return max(kv, compute / len(places))


def _pack(
    demands: Sequence[Demand], places: Sequence[Place], kv_unit: float, limit: float, *, strict: bool = False
) -> Packing | None:
    """What does not fit below the limit goes where the result is least; a limit of 0 makes it the paper's greedy.

    ``strict``: None, as soon as one has room and is over the limit wherever it goes.
    """
    bins = [
        _Bin(p, i, p.pressure, p.compute, p.awake_weights_bytes, p.home_weights_bytes, p.free_bytes)
        for i, p in enumerate(places)
    ]
    typical = max(1, sum(p.budget_bytes for p in places) // max(1, len(places)))

    def size(number: int) -> tuple[float, int, str, int]:
        demand = demands[number]
        if limit == math.inf or limit <= 0.0:
            return (-demand.pressure, -demand.needed_bytes, demand.model, demand.part)
        kv = kv_unit * demand.pressure / (limit * typical) + demand.weights_bytes / typical
        return (-max(kv, demand.compute / limit), -demand.needed_bytes, demand.model, demand.part)

    chosen: list[str | None] = [None] * len(demands)
    heap = [(b.key(limit, kv_unit), b) for b in bins]
    heapq.heapify(heap)
    # Hundreds of devices are looked up for each of hundreds of models.
    sets = {demand.devices: frozenset(demand.devices) for demand in demands}
    allowed = [sets[demand.devices] for demand in demands]
    left: list[int] = []
    for number in sorted(range(len(demands)), key=size):
        demand = demands[number]
        best = None if limit <= 0.0 else _take_first(heap, demand, allowed[number], kv_unit, limit)
        if best is None:
            if strict and any(_may_take(b, demand, allowed[number]) for b in bins):
                return None
            left.append(number)
            continue
        chosen[number] = best.place.device
        heapq.heappush(heap, (best.key(limit, kv_unit), best))
    for number in left:  # over the limit, then, where there is room
        demand = demands[number]
        fitting = [(b.with_(demand, kv_unit), b) for b in bins if _may_take(b, demand, allowed[number])]
        if fitting:
            least = min(value for value, _ in fitting)
            best = min((b for value, b in fitting if value == least), key=lambda b: b.key(limit, kv_unit))
            best.take(demand)
            chosen[number] = best.place.device
    pressures = (
        max(kv_asked(kv_unit, b.pressure, b.place.budget_bytes - b.weights_bytes), b.compute) for b in bins
    )
    return Packing(tuple(chosen), max(pressures, default=0.0))


def _take_first(
    heap: list[tuple[tuple[float, float, int, int], _Bin]],
    demand: Demand,
    allowed: frozenset[str],
    kv_unit: float,
    limit: float,
) -> _Bin | None:
    """The emptiest device that may have it, with it, and no longer in the heap."""
    passed_over = []
    found = None
    while heap:
        entry = heapq.heappop(heap)
        if _may_take(entry[1], demand, allowed) and entry[1].with_(demand, kv_unit) <= limit:
            found = entry[1]
            found.take(demand)
            break
        passed_over.append(entry)
    for entry in passed_over:
        heapq.heappush(heap, entry)
    return found


def _may_take(b: _Bin, demand: Demand, allowed: frozenset[str]) -> bool:
    return demand.needed_bytes <= b.free_bytes and b.place.device in allowed and demand.model not in b.models


def plan(demands: Sequence[Demand], places: Sequence[Place], kv_unit: float = 1.0) -> dict[str, Choice]:
    """Devices for models that are started together. One that does not fit has none.

    While nothing is known of what is asked, all are taken to be asked alike: decode is bound by the weights that each
    step reads, so each costs its weights over its TPOT SLO.
    """
    asked: list[Demand | Place] = [*demands, *places]
    if any(it.pressure > 0 or it.compute > 0 for it in asked):
        packing = pack(demands, places, kv_unit)
        why = f"largest pressure {packing.largest:.3g}"
    else:
        alike = [replace(demand, compute=demand.reads) for demand in demands]
        packing = pack(alike, [replace(place, compute=place.home_reads) for place in places], kv_unit)
        why = f"all models decoding would read {show_size(round(packing.largest))}/s on a device at most"
    return {
        demand.model: _left_out(demand) if device is None else Choice(device, why)
        for demand, device in zip(demands, packing.devices, strict=True)
    }


def _left_out(demand: Demand) -> Choice:
    if not demand.devices:
        return choose(demand, [])
    needed = show_size(demand.needed_bytes)
    return Choice(None, f"{demand.model} needs {needed}; no device has as much free")
