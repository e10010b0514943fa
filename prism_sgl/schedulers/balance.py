"""Global pass, pure: which models to move so that the most pressed device is pressed less.

A step is one model's move, or two models that change places. It is taken if the larger pressure of the two devices
falls by ``gain`` of what the source has now, and by what the step costs; so a fleet without an imbalance, or one whose
imbalance no step can mend, stays as it is. When steps lead no further, bisection says what a new placement of all
would reach, and it is taken if it differs from the present one in no more models than may move in one pass.

What is not looked at: more than ``_MOST_TARGETS`` targets for exchanges, the least pressed ones; devices of less than
``CALM``, where nothing is short.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prism_sgl.schedulers.placement import Demand, Place, kv_asked, pack

# Below this nobody is short of anything: a quarter of the KV or of the time is asked for.
CALM = 0.25
# One model that asks for more than a device gets a replica; one that fewer could carry with this to spare loses one.
_HOT, _COOL = 1.0, 0.7
_MOST_SOURCES = 16
# In a larger fleet the best placement differs from the present one in more models than may move.
_CHAIN_UP_TO = 32
_MOST_TARGETS = 16
# Sums of what is asked go up and down by floats; less than this is nothing.
_NOTHING = 1e-6


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
        return f"{_number(self.largest)} (KV {_number(self.kv)}, compute {_number(self.compute)})"


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


@dataclass(frozen=True)
class Verdict:
    steps: tuple[Step, ...]
    reason: str


@dataclass(slots=True)
class _Side:
    """A device with all that serves there, while steps are tried."""

    place: Place
    kv_unit: float
    there: dict[tuple[str, int], Serving] = field(default_factory=dict)
    pressure: float = 0.0
    compute: float = 0.0
    weights_bytes: int = 0
    free_bytes: int = 0  # a source gives nothing back before its target is awake: only takes count here

    def add_up(self) -> None:
        demands = [serving.demand for serving in self.there.values()]
        self.pressure = self.place.pressure + math.fsum(d.pressure for d in demands)
        self.compute = self.place.compute + math.fsum(d.compute for d in demands)
        self.weights_bytes = self.place.awake_weights_bytes + sum(d.weights_bytes for d in demands)

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
    return {name: side.value() for name, side in _sides(servings, places, kv_unit).items()}


def rebalance(
    servings: Sequence[Serving], places: Sequence[Place], kv_unit: float, *, gain: float, most_steps: int
) -> Verdict:
    """The steps of one pass, each with its reason, and why there are no more of them.

    ``place.free_bytes`` is what a model that comes may have, ``awake_weights_bytes``, ``pressure`` and ``compute`` are
    of what is there beside the servings.
    """
    sides = _sides(servings, places, kv_unit)
    steps = list(_replica_steps(sides, gain, most_steps))
    names = Counter(serving.demand.model for serving in servings if serving.demand.part == 0)
    # One of several runtimes of a model is given up and made anew elsewhere, not moved.
    touched = {step.model for step in steps} | {name for name, count in names.items() if count > 1}
    while len(steps) < most_steps:
        ranked = sorted(sides.values(), key=lambda s: (-s.value().largest, s.place.device))
        largest = ranked[0].value().largest if ranked else 0.0
        if largest < CALM:
            return Verdict(tuple(steps), f"no device is pressed ({_number(largest)} at most)")
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
                return Verdict(tuple(steps), f"no step lowers {_number(largest)} by {gain:.0%}")
            found = chain
        steps += _take(sides, found)
        touched |= {step.model for step in steps}
    return Verdict(tuple(steps), f"{most_steps} steps are enough for one pass")


def _sides(servings: Iterable[Serving], places: Sequence[Place], kv_unit: float) -> dict[str, _Side]:
    sides = {place.device: _Side(place, kv_unit, free_bytes=place.free_bytes) for place in places}
    for serving in servings:
        sides[serving.device].there[serving.demand.model, serving.demand.part] = serving
    for side in sides.values():
        side.add_up()
    return sides


def _best_step(
    source: _Side, targets: Sequence[_Side], gain: float, most: int, touched: set[str]
) -> _Candidate | None:
    """Of the moves from this device and the exchanges with others, what leaves the two devices pressed least."""
    now = source.value().largest
    enough = now * (1 - gain)
    best: _Candidate | None = None
    going = [s for s in source.there.values() if not s.stays and s.demand.model not in touched]
    relieved = {id(s): source.value(minus=s.demand).largest for s in going}

    def consider(candidate: _Candidate) -> None:
        nonlocal best
        becomes = candidate.worst + candidate.cost
        if becomes <= enough and becomes < now and (best is None or candidate.key < best.key):
            best = candidate

    for target in targets:
        if target is source or target.value().largest > enough:
            continue
        for serving in going:
            has_room = serving.demand.needed_bytes <= target.free_bytes
            if has_room and relieved[id(serving)] <= enough and target.may_take(serving.demand):
                worst = max(relieved[id(serving)], target.value(plus=serving.demand).largest)
                name = target.place.device
                consider(_Candidate(worst, serving.cost_to(name), ((serving, name),)))
    if most >= 2:
        for target in targets[:_MOST_TARGETS]:
            if target is not source and target.value().largest <= enough:
                for candidate in _exchanges(source, target, going, touched):
                    consider(candidate)
    return best


def _exchanges(
    source: _Side, target: _Side, going: Sequence[Serving], touched: set[str]
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
                yield _Candidate(max(here, there), cost, steps if out_first else steps[::-1])


def _chain(sides: Mapping[str, _Side], kv_unit: float, gain: float, largest: float) -> _Candidate | None:
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
    if steps and all_placed and has_room and is_apart and packing.largest + cost <= largest * (1 - gain):
        return _Candidate(packing.largest, cost, steps)
    return None


def _take(sides: Mapping[str, _Side], found: _Candidate) -> Iterator[Step]:
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
    for number, (serving, target) in enumerate(found.steps):
        source, model = serving.device, serving.demand.model
        reason = (
            f"pressure of {source} {before[source]} falls to {_number(sides[source].value().largest)}, "
            f"of {target} {before[target]} becomes {_number(sides[target].value().largest)}"
        )
        if is_exchange:
            reason += f"; changes places with {found.steps[1 - number][0].demand.model}"
        if (cost := serving.cost_to(target)) >= 0.005:
            reason += f"; its {'wake' if target == serving.near else 'start'} costs {_number(cost)}"
        first = found.steps[0][0].demand.model if is_exchange and number == 1 else ""
        yield Step("move", model, source, target, reason, waits_for=first, part=serving.demand.part)


# ---------------------------------------------------------------- replicas


def _replica_steps(sides: Mapping[str, _Side], gain: float, most: int) -> Iterator[Step]:
    by_model: dict[str, list[Serving]] = {}
    for side in sides.values():
        for (model, part), serving in side.there.items():
            if part == 0:
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


def _alone(side: _Side, demand: Demand) -> float:
    """What the model asks of the device, if it had it for itself."""
    shared = side.place.budget_bytes - demand.weights_bytes
    return max(demand.compute, kv_asked(side.kv_unit, demand.pressure, shared))


def _replicate(sides: Mapping[str, _Side], servings: Sequence[Serving], gain: float) -> Step | None:
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
    if max(relieved.largest, after.largest) + servings[0].cost_to(target.place.device) > now.largest * (
        1 - gain
    ):
        return None
    reason = (
        f"asks for {_number(max(_alone(source, old), old.compute) * num)} devices and has {num}: "
        f"pressure of {source.place.device} {now} falls to {_number(relieved.largest)}, "
        f"of {target.place.device} becomes {_number(after.largest)}"
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


def _drop(sides: Mapping[str, _Side], servings: Sequence[Serving]) -> Step | None:
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
    reason = f"{rest} of its {len(servings)} runtimes carry it: {_number(asks)} of a device each"
    return Step("drop", old.model, gone.device, "", reason)


# ---------------------------------------------------------------- in words


def explain(
    model: str, servings: Sequence[Serving], places: Sequence[Place], kv_unit: float, *, gain: float
) -> list[str]:
    """For each device, its pressure as seen, and what would become of it with this model there."""
    sides = _sides(servings, places, kv_unit)
    its = [s for s in servings if s.demand.model == model]
    lines = []
    for name, side in sides.items():
        line = f"{name}: pressure {side.value()}"
        if here := next((s for s in its if s.device == name), None):
            share = side.value(minus=here.demand).largest
            lines.append(f"{line}; without {model} {_number(share)}")
            continue
        if its:
            line += f"; {_would_be(its[0], sides[its[0].device], side, gain)}"
        lines.append(line)
    return lines


def _would_be(serving: Serving, source: _Side, target: _Side, gain: float) -> str:
    demand, now = serving.demand, source.value().largest
    if target.place.device not in demand.devices:
        return "not among the devices of this model"
    worst = max(source.value(minus=demand).largest, target.value(plus=demand).largest)
    becomes = f"the move would bring the larger of the two from {_number(now)} to {_number(worst)}"
    if demand.needed_bytes > target.free_bytes:
        return f"{becomes}, but there is no room"
    if now < CALM:
        return f"{becomes}; nothing moves below {CALM}"
    limit = now * (1 - gain) - serving.cost_to(target.place.device)
    if worst > limit:
        return f"{becomes}, more than the {_number(max(0.0, limit))} that would be worth it"
    return becomes


def _number(value: float) -> str:
    return "inf" if value == math.inf else f"{value:.2f}"
