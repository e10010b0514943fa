"""Replicas: more runtimes than one for a model that asks for more than a device, and fewer again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from prism_sgl.schedulers.placement import Demand, kv_asked
from prism_sgl.schedulers.sides import Bar, Serving, Side, Step, number

# One model that asks for more than a device gets a replica; one that fewer could carry with this to spare loses one.
_HOT, _COOL = 1.0, 0.7


def replica_steps(sides: Mapping[str, Side], gain: float, most: int) -> Iterator[Step]:
    """A model of several parts has no replicas."""
    by_model: dict[str, list[Serving]] = {}
    in_parts = {model for side in sides.values() for model, part in side.there if part > 0}
    for side in sides.values():
        for (model, _), serving in side.there.items():
            if model not in in_parts:
                by_model.setdefault(model, []).append(serving)
    count = 0
    for servings in by_model.values():
        if count >= most:
            return
        share = servings[0].demand
        alone = max(_alone(sides[s.device], share) for s in servings)
        if alone > _HOT and not any(s.stays for s in servings):
            step = _replicate(sides, servings, gain)
        elif len(servings) > 1 and alone * len(servings) < _COOL * (len(servings) - 1):
            step = _drop(sides, servings)
        else:
            continue
        if step is not None:
            count += 1
            yield step


def _alone(side: Side, demand: Demand) -> float:
    """What the model asks of the device, if it had it for itself."""
    shared = side.place.budget_bytes - demand.weights_bytes
    return max(demand.compute, kv_asked(side.kv_unit, demand.pressure, shared))


def _replicate(sides: Mapping[str, Side], servings: Sequence[Serving], gain: float) -> Step | None:
    num, old = len(servings), servings[0].demand
    part = num / (num + 1)
    new = replace(old, pressure=old.pressure * part, compute=old.compute * part)
    source = max((sides[s.device] for s in servings), key=lambda side: side.value().largest)
    now, relieved = (
        source.value(),
        source.value(plus=replace(new, weights_bytes=0), minus=replace(old, weights_bytes=0)),
    )
    fitting = [side for side in sides.values() if side.may_take(new) and new.needed_bytes <= side.free_bytes]
    if not fitting:
        return None
    target = min(fitting, key=lambda side: (side.value(plus=new).largest, side.place.device))
    after = target.value(plus=new)
    bar, cost = Bar.of(source, target, (old,), gain), servings[0].cost_to(target.place.device)
    if not bar.passes(relieved.largest, after.largest, cost):
        return None
    reason = (
        f"asks for {number(max(_alone(source, old), old.compute) * num)} devices and has {num}: "
        f"pressure of {source.place.device} {now} falls to {number(relieved.largest)}, "
        f"of {target.place.device} becomes {number(after.largest)}"
    )
    for serving in servings:
        side = sides[serving.device]
        side.there[old.model, 0] = replace(serving, demand=new)
        side.add_up()
    name = target.place.device
    target.there[old.model, 0] = replace(servings[0], demand=new, device=name, stays="is starting")
    target.free_bytes -= new.needed_bytes
    target.add_up()
    return Step("replica", old.model, source.place.device, name, reason)


def _drop(sides: Mapping[str, Side], servings: Sequence[Serving]) -> Step | None:
    movable = [s for s in servings if not s.stays]
    if len(movable) < len(servings):
        return None
    gone = max(servings, key=lambda s: (sides[s.device].value().largest, s.device))
    rest, old = len(servings) - 1, gone.demand
    new = replace(
        old, pressure=old.pressure * len(servings) / rest, compute=old.compute * len(servings) / rest
    )
    for serving in servings:
        side = sides[serving.device]
        if serving is gone:
            del side.there[old.model, 0]
        else:
            side.there[old.model, 0] = replace(serving, demand=new)
        side.add_up()
    asks = max(_alone(sides[s.device], new) for s in servings)
    reason = f"{rest} of its {len(servings)} runtimes carry it: {number(asks)} of a device each"
    return Step("drop", old.model, gone.device, "", reason)
