"""Candidate placements for policies that never change theirs, best guess first.

Guess: the load of a model is the part of a device that it keeps busy when it is alone on one (measured by a replay
of its own). The placement with the least loaded busiest device is the best guess; the next ones are tried too,
because queues are not only a matter of load.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

from prism_sgl.schedulers.replay.spec import Fleet, ModelSpec

_MOST_EXHAUSTIVE = 100_000
_RESTARTS = 200
_SEED = 20261


def candidates(fleet: Fleet, loads: Mapping[str, float], count: int) -> list[dict[str, tuple[int, ...]]]:
    """Up to ``count`` placements that fit, distinct up to renaming devices; if none fits, those that leave some out."""
    singles = [m for m in fleet.models if m.tp == 1]
    exhaustive = len(singles) == len(fleet.models) and (
        fleet.num_devices ** max(0, len(singles) - 1) <= _MOST_EXHAUSTIVE
    )
    found: dict[tuple[tuple[str, ...], ...], tuple[float, dict[str, tuple[int, ...]]]] = {}
    for placement in _all(fleet, singles) if exhaustive else _greedy(fleet, loads):
        score = _score(fleet, placement, loads)
        if score is None:
            continue
        key = _shape(fleet, placement)
        if key not in found or score < found[key][0]:
            found[key] = (score, placement)
    ranked = sorted(found.values(), key=lambda entry: (entry[0], sorted(entry[1].items())))
    return [placement for _, placement in ranked[:count]] or _leaving_out(fleet, loads, count)


def _all(fleet: Fleet, models: Sequence[ModelSpec]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The first model stays on the first device: devices are alike."""
    names = [m.name for m in models]
    for rest in itertools.product(range(fleet.num_devices), repeat=len(names) - 1):
        yield {name: (device,) for name, device in zip(names, (0, *rest), strict=True)}


def _greedy(fleet: Fleet, loads: Mapping[str, float]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The largest load first, each to the least loaded device with room; then again with loads blurred."""
    noise = random.Random(_SEED)
    for restart in range(_RESTARTS):
        blur = 0.0 if restart == 0 else 0.3
        yield _place(fleet, {m: load * (1 + blur * noise.uniform(-1, 1)) for m, load in loads.items()})


def _place(fleet: Fleet, loads: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    used, load = [0] * fleet.num_devices, [0.0] * fleet.num_devices
    placement: dict[str, tuple[int, ...]] = {}
    order = sorted(
        fleet.models, key=lambda m: (-m.tp, -m.costs.weights_bytes if m.tp > 1 else 0, -loads[m.name])
    )
    for model in order:
        need = model.costs.awake_bytes
        room = [i for i in range(fleet.num_devices) if used[i] + need <= fleet.device_bytes]
        if len(room) < model.tp:
            continue
        chosen = tuple(sorted(room, key=lambda i: (load[i], used[i], i))[: model.tp])
        for i in chosen:
            used[i] += need
            load[i] += loads[model.name]
        placement[model.name] = chosen
    return placement


def _leaving_out(fleet: Fleet, loads: Mapping[str, float], count: int) -> list[dict[str, tuple[int, ...]]]:
    """Where not all fit: the models with most load for their memory, then fewer and fewer of them.

    Fewer models leave more KV to those that are served, which may be worth more than the requests that are not.
    """
    order = sorted(fleet.models, key=lambda m: (-loads[m.name] / m.costs.awake_bytes, m.name))
    found: list[dict[str, tuple[int, ...]]] = []
    for keep in range(len(order), 0, -1):
        kept = Fleet(fleet.name, tuple(order[:keep]), fleet.num_devices, fleet.device_bytes)
        density = {m.name: loads[m.name] / m.costs.awake_bytes for m in kept.models}
        placement = _place(kept, density)
        if placement not in found:
            found.append(placement)
    return found[:count]


def _score(
    fleet: Fleet, placement: Mapping[str, tuple[int, ...]], loads: Mapping[str, float]
) -> float | None:
    if len(placement) < len(fleet.models):
        return None
    specs = fleet.by_name()
    used, load = [0] * fleet.num_devices, [0.0] * fleet.num_devices
    for model, devices in placement.items():
        for i in devices:
            used[i] += specs[model].costs.awake_bytes
            load[i] += loads[model]
    if max(used) > fleet.device_bytes:
        return None
    return max(load) + 1e-3 * sum(x * x for x in load) + 1e-6 * max(used) / fleet.device_bytes


def _shape(fleet: Fleet, placement: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], ...]:
    groups = (
        tuple(sorted(m for m, devices in placement.items() if i in devices)) for i in range(fleet.num_devices)
    )
    return tuple(sorted(groups))
