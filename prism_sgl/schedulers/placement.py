"""Global level: on which device a model is started.

KVPR (KV pressure ratio, Prism section 6.1): w_j = token rate x KV bytes a token / TPOT SLO of model j, and
KVPR_i = sum of w_j / (budget_i - sum of weights_j) over the models awake on device i. A model goes where the
*resulting* ratio is smallest: the paper's text says so, its pseudo-code takes the ratio before the model is added
and has no fit test (facts/prism.md 3.2, points 1 and 2). The number has no meaning beside another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prism_sgl.units import show_size


@dataclass(frozen=True)
class Demand:
    """A model that looks for a device. ``needed_bytes`` = weights + floor of KV + overhead."""

    model: str
    weights_bytes: int
    needed_bytes: int
    pressure: float  # w_j
    devices: tuple[str, ...]  # where it may go


@dataclass(frozen=True)
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


def choose(demand: Demand, places: Iterable[Place]) -> Choice:
    """The device for one model: smallest resulting KVPR among those where it fits.

    It fits where there is room now or idle models would make it; failing that, where there would be room if
    all but the pinned ones slept. Equal ratios (nothing is asked of anybody yet) go where fewer weights have
    their home, or all models would start on the first device.
    """
    allowed = [place for place in places if place.device in demand.devices]
    for fits in (_fits_soon, _fits_some_time):
        fitting = [place for place in allowed if fits(demand, place)]
        if fitting:
            best = min(fitting, key=lambda place: _rank(demand, place))
            ratio = _resulting(demand, best)
            return Choice(best.device, f"{best.device} has the smallest KV pressure ({ratio:.3g})")
    if not allowed:
        return Choice(None, f"{demand.model} may be placed on no device")
    most = max(allowed, key=lambda place: place.possible_bytes)
    return Choice(
        None,
        f"{demand.model} needs {show_size(demand.needed_bytes)}, and {most.device} can give "
        f"{show_size(max(0, most.possible_bytes))} at most: the rest is pinned or held by sleeping models",
    )


def plan(demands: Iterable[Demand], places: Sequence[Place]) -> dict[str, Choice]:
    """Algorithm 1: the most demanding model first, each to the device of the smallest resulting KVPR.

    Only free room counts: the result is a set of models that can all be awake at the same time. One that does not
    fit any more has no device.
    """
    by_name = {place.device: replace(place, reclaimable_bytes=0, possible_bytes=0) for place in places}
    chosen: dict[str, Choice] = {}
    for demand in sorted(demands, key=lambda d: (-d.pressure, -d.needed_bytes, d.model)):
        choice = chosen[demand.model] = choose(demand, by_name.values())
        if choice.device is not None:
            place = by_name[choice.device]
            by_name[choice.device] = replace(
                place,
                free_bytes=place.free_bytes - demand.needed_bytes,
                awake_weights_bytes=place.awake_weights_bytes + demand.weights_bytes,
                home_weights_bytes=place.home_weights_bytes + demand.weights_bytes,
                pressure=place.pressure + demand.pressure,
            )
    return chosen


def _fits_soon(demand: Demand, place: Place) -> bool:
    return demand.needed_bytes <= place.free_bytes + place.reclaimable_bytes


def _fits_some_time(demand: Demand, place: Place) -> bool:
    return demand.needed_bytes <= place.possible_bytes


def _resulting(demand: Demand, place: Place) -> float:
    shared = place.budget_bytes - place.awake_weights_bytes - demand.weights_bytes
    return kvpr(place.pressure + demand.pressure, shared)


def _rank(demand: Demand, place: Place) -> tuple[float, float, int]:
    home = (place.home_weights_bytes + demand.weights_bytes) / max(1, place.budget_bytes)
    return (_resulting(demand, place), home, -place.free_bytes)
