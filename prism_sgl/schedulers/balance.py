"""Global pass, pure: which models to move so that the most pressed device is pressed less.

A step is one model's move, or two models that change places. It is taken if the larger pressure of the two devices
falls by ``gain`` of what the source has now, by more than may be chance (sides.Bar), and by what the step costs; so a
fleet without an imbalance, or one whose imbalance no step can mend, stays as it is. When steps lead no further,
bisection says what a new placement of all would reach, and it is taken if it differs from the present one in no more
models than may move in one pass.

What is not looked at: more than ``_MOST_TARGETS`` targets for exchanges, the least pressed ones; devices of less than
``CALM``, where nothing is short.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from prism_sgl.schedulers.placement import Place, pack
from prism_sgl.schedulers.replicas import replica_steps
from prism_sgl.schedulers.sides import Bar, Pressure, Serving, Side, Step, below, number, sides_of

# Below this nobody is short of anything: a quarter of the KV or of the time is asked for.
CALM = 0.25
_MOST_SOURCES = 16
# In a larger fleet the best placement differs from the present one in more models than may move.
_CHAIN_UP_TO = 32
_MOST_TARGETS = 16


@dataclass(frozen=True)
class Verdict:
    steps: tuple[Step, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    worst: float
    cost: float
    steps: tuple[tuple[Serving, str], ...]  # who goes where, in this order

    @property
    def key(self) -> tuple[float, int, int, str, str]:
        first, target = self.steps[0]
        return (self.worst + self.cost, len(self.steps), first.priority, first.demand.model, target)


def pressures(servings: Iterable[Serving], places: Sequence[Place], kv_unit: float) -> dict[str, Pressure]:
    return {name: side.value() for name, side in sides_of(servings, places, kv_unit).items()}


def rebalance(
    servings: Sequence[Serving], places: Sequence[Place], kv_unit: float, *, gain: float, most_steps: int
) -> Verdict:
    """The steps of one pass, each with its reason, and why there are no more of them.

    ``place.free_bytes`` is what a model that comes may have, ``awake_weights_bytes``, ``pressure`` and ``compute`` are
    of what is there beside the servings.
    """
    sides = sides_of(servings, places, kv_unit)
    steps = list(replica_steps(sides, gain, most_steps))
    names = Counter(serving.demand.model for serving in servings if serving.demand.part == 0)
    # One of several runtimes of a model is given up and made anew elsewhere, not moved.
    touched = {step.model for step in steps} | {name for name, count in names.items() if count > 1}
    while len(steps) < most_steps:
        ranked = sorted(sides.values(), key=lambda s: (-s.value().largest, s.place.device))
        largest = ranked[0].value().largest if ranked else 0.0
        if largest < CALM:
            return Verdict(tuple(steps), f"no device is pressed ({number(largest)} at most)")
        sources = [s for s in ranked if s.value().largest >= largest * (1 - gain)][:_MOST_SOURCES]
        found = None
        for source in sources:
            found = _best_step(source, ranked[::-1], gain, most_steps - len(steps), touched)
            if found is not None:
                break
        if found is None:
            is_small = not steps and len(servings) <= _CHAIN_UP_TO
            chain = _chain(sides, kv_unit, gain, largest) if is_small else None
            if chain is None or len(chain.steps) > most_steps:
                return Verdict(tuple(steps), f"no step lowers {number(largest)} by {gain:.0%}")
            found = chain
        steps += _take(sides, found)
        touched |= {step.model for step in steps}
    return Verdict(tuple(steps), f"{most_steps} steps are enough for one pass")


def _best_step(
    source: Side, targets: Sequence[Side], gain: float, most: int, touched: set[str]
) -> _Candidate | None:
    """Of the moves from this device and the exchanges with others, what leaves the two devices pressed least."""
    now = source.value().largest
    limit = below(now, gain, 0.0)
    best: _Candidate | None = None
    going = [s for s in source.there.values() if not s.stays and s.demand.model not in touched]
    relieved = {id(s): source.value(minus=s.demand).largest for s in going}

    def consider(candidate: _Candidate) -> None:
        nonlocal best
        if candidate.worst + candidate.cost < now and (best is None or candidate.key < best.key):
            best = candidate

    others = [side for side in targets if side is not source and side.value().largest <= limit]
    for target in others:
        for serving in going:
            here, demand = relieved[id(serving)], serving.demand
            if demand.needed_bytes <= target.free_bytes and here <= limit and target.may_take(demand):
                there = target.value(plus=demand).largest
                name = target.place.device
                cost = serving.cost_to(name)
                if Bar.of(source, target, (demand,), gain).passes(here, there, cost):
                    consider(_Candidate(max(here, there), cost, ((serving, name),)))
    if most >= 2:
        for target in others[:_MOST_TARGETS]:
            for candidate in _exchanges(source, target, going, touched, gain):
                consider(candidate)
    return best


def _exchanges(
    source: Side, target: Side, going: Sequence[Serving], touched: set[str], gain: float
) -> Iterator[_Candidate]:
    """Target first holds for both: one has its room now, the other once the first has left."""
    coming = [s for s in target.there.values() if not s.stays and s.demand.model not in touched]
    for out in going:
        if not target.may_take(out.demand):
            continue
        for back in coming:
            if not source.may_take(back.demand):
                continue
            a, b = out.demand.needed_bytes, back.demand.needed_bytes
            out_first = a <= target.free_bytes and b <= source.free_bytes + a
            back_first = b <= source.free_bytes and a <= target.free_bytes + b
            if out_first or back_first:
                there = target.value(plus=out.demand, minus=back.demand).largest
                here = source.value(plus=back.demand, minus=out.demand).largest
                steps = ((out, target.place.device), (back, source.place.device))
                cost = out.cost_to(target.place.device) + back.cost_to(source.place.device)
                if Bar.of(source, target, (out.demand, back.demand), gain).passes(here, there, cost):
                    yield _Candidate(max(here, there), cost, steps if out_first else steps[::-1])


def _chain(sides: Mapping[str, Side], kv_unit: float, gain: float, largest: float) -> _Candidate | None:
    """The best placement of all, if it can be had by moves that all have their room now."""
    moving = [s for side in sides.values() for s in side.there.values() if not s.stays]
    fixed = [s for side in sides.values() for s in side.there.values() if s.stays]
    places = []
    for name, side in sides.items():
        gives = sum(s.demand.needed_bytes for s in moving if s.device == name)
        stay = [s.demand for s in fixed if s.device == name]
        places.append(
            replace(
                side.place,
                free_bytes=side.free_bytes + gives,
                awake_weights_bytes=side.place.awake_weights_bytes + sum(d.weights_bytes for d in stay),
                pressure=side.place.pressure + math.fsum(d.pressure for d in stay),
                compute=side.place.compute + math.fsum(d.compute for d in stay),
            )
        )
    packing = pack([s.demand for s in moving], places, kv_unit)
    steps = tuple(
        (serving, device)
        for serving, device in zip(moving, packing.devices, strict=True)
        if device is not None and device != serving.device
    )
    cost = math.fsum(serving.cost_to(device) for serving, device in steps)
    comes: dict[str, int] = {}
    for serving, device in steps:
        comes[device] = comes.get(device, 0) + serving.demand.needed_bytes
    has_room = all(count <= sides[device].free_bytes for device, count in comes.items())
    is_apart = all(sides[device].may_take(serving.demand) for serving, device in steps)
    all_placed = packing.num_placed == len(moving)
    of_moved = math.fsum(sides[s.device].variance_of(s.demand) for s, _ in steps)
    touched = {name for serving, device in steps for name in (serving.device, device)}
    of_rest = math.fsum(sides[name].variance for name in touched) - of_moved
    limit = below(largest, gain, max(of_moved, of_rest))
    if steps and all_placed and has_room and is_apart and packing.largest + cost <= limit:
        return _Candidate(packing.largest, cost, steps)
    return None


def _take(sides: Mapping[str, Side], found: _Candidate) -> Iterator[Step]:
    """Carry it out on the picture, and say it in words."""
    before = {name: sides[name].value() for s, target in found.steps for name in (s.device, target)}
    for serving, target in found.steps:
        key = (serving.demand.model, serving.demand.part)
        del sides[serving.device].there[key]
        sides[target].there[key] = replace(serving, device=target)
        sides[target].free_bytes -= serving.demand.needed_bytes
    for name in before:
        sides[name].add_up()
    is_exchange = len(found.steps) == 2 and found.steps[0][0].device == found.steps[1][1]
    for index, (serving, target) in enumerate(found.steps):
        source, model = serving.device, serving.demand.model
        reason = (
            f"pressure of {source} {before[source]} falls to {number(sides[source].value().largest)}, "
            f"of {target} {before[target]} becomes {number(sides[target].value().largest)}"
        )
        if is_exchange:
            reason += f"; changes places with {found.steps[1 - index][0].demand.model}"
        if (cost := serving.cost_to(target)) >= 0.005:
            reason += f"; its {'wake' if target == serving.near else 'start'} costs {number(cost)}"
        first = found.steps[0][0].demand.model if is_exchange and index == 1 else ""
        yield Step("move", model, source, target, reason, waits_for=first, part=serving.demand.part)


# ---------------------------------------------------------------- in words


def explain(
    model: str, servings: Sequence[Serving], places: Sequence[Place], kv_unit: float, *, gain: float
) -> list[str]:
    """For each device, its pressure as seen, and what would become of it with this model there."""
    sides = sides_of(servings, places, kv_unit)
    its = [s for s in servings if s.demand.model == model]
    lines = []
    for name, side in sides.items():
        line = f"{name}: pressure {side.value()}"
        if here := next((s for s in its if s.device == name), None):
            share = side.value(minus=here.demand).largest
            lines.append(f"{line}; without {model} {number(share)}")
            continue
        if its:
            line += f"; {_would_be(its[0], sides[its[0].device], side, gain)}"
        lines.append(line)
    return lines


def _would_be(serving: Serving, source: Side, target: Side, gain: float) -> str:
    demand, now = serving.demand, source.value().largest
    if target.place.device not in demand.devices:
        return "not among the devices of this model"
    here, there = source.value(minus=demand).largest, target.value(plus=demand).largest
    worst = max(here, there)
    becomes = f"the move would bring the larger of the two from {number(now)} to {number(worst)}"
    if demand.needed_bytes > target.free_bytes:
        return f"{becomes}, but there is no room"
    if now < CALM:
        return f"{becomes}; nothing moves below {CALM}"
    bar, cost = Bar.of(source, target, (demand,), gain), serving.cost_to(target.place.device)
    if not bar.passes(here, there, cost):
        limit = max(0.0, (bar.source if here + cost > bar.source else bar.target) - cost)
        return f"{becomes}, and {number(max(0.0, limit))} would be worth it"
    return becomes
