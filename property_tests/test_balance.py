"""The global pass on any picture: no budget exceeded, nobody moved who stays, and only for the better."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.schedulers.balance import CALM, Verdict, pressures, rebalance
from prism_sgl.schedulers.placement import Demand, Place, pack
from prism_sgl.schedulers.sides import Serving

DEVICES = ("a", "b", "c", "d")
servings = st.lists(
    st.builds(
        lambda number, weights, kv, pressure, compute, devices, device, stays, cost, priority: Serving(
            Demand(f"m{number}", weights, weights + kv, pressure, tuple(sorted({*devices, device})), compute),
            device,
            "it is pinned" if stays else "",
            cost,
            priority,
        ),
        st.integers(0, 99),
        st.integers(1, 40),
        st.integers(1, 20),
        st.floats(0, 60),
        st.floats(0, 2),
        st.sets(st.sampled_from(DEVICES)),
        st.sampled_from(DEVICES),
        st.booleans(),
        st.floats(0, 0.2),
        st.integers(0, 3),
    ),
    max_size=14,
    unique_by=lambda serving: serving.demand.model,
)
rooms = st.lists(st.integers(0, 120), min_size=4, max_size=4)


def run(given_servings: list[Serving], free: list[int], gain: float = 0.1, most: int = 3) -> Verdict:
    return rebalance(given_servings, places(free), 1.0, gain=gain, most_steps=most)


def places(free: list[int]) -> list[Place]:
    return [Place(name, 200, room) for name, room in zip(DEVICES, free, strict=True)]


@settings(derandomize=True, database=None, max_examples=400, deadline=None)
@given(given_servings=servings, free=rooms)
def test_steps_fit_and_move_only_what_may_move(given_servings: list[Serving], free: list[int]) -> None:
    verdict = run(given_servings, free)
    assert len(verdict.steps) <= 3
    by_model = {serving.demand.model: serving for serving in given_servings}
    room = dict(zip(DEVICES, free, strict=True))
    for step in verdict.steps:
        serving = by_model[step.model]
        assert not serving.stays
        assert step.source == serving.device
        assert step.target in serving.demand.devices
        assert step.target != step.source
        if step.waits_for:
            room[step.target] += by_model[step.waits_for].demand.needed_bytes
        room[step.target] -= serving.demand.needed_bytes
        assert room[step.target] >= 0, "more than there is room for"
        assert step.reason
    assert len({step.model for step in verdict.steps}) == len(verdict.steps), "twice in one pass"


@settings(derandomize=True, database=None, max_examples=400, deadline=None)
@given(given_servings=servings, free=rooms)
def test_what_a_step_touches_is_pressed_less_by_the_gain(
    given_servings: list[Serving], free: list[int]
) -> None:
    """Without replicas, the devices of all steps together end below the most pressed of them by 10 %."""
    tame = [replace(s, demand=replace(s.demand, compute=min(s.demand.compute, 0.9))) for s in given_servings]
    verdict = run(tame, free, most=2)
    if not verdict.steps or any(step.kind != "move" for step in verdict.steps):
        return
    before = pressures(tame, places(free), 1.0)
    target = {step.model: step.target for step in verdict.steps}
    moved = [replace(s, device=target.get(s.demand.model, s.device)) for s in tame]
    after = pressures(moved, places(free), 1.0)
    touched = {name for step in verdict.steps for name in (step.source, step.target)}
    worst_before = max(before[name].largest for name in touched)
    worst_after = max(after[name].largest for name in touched)
    assert worst_before >= CALM
    assert worst_after <= worst_before * 0.9 + 1e-9
    assert max(p.largest for p in after.values()) <= max(p.largest for p in before.values()) + 1e-9


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(given_servings=servings, free=rooms)
def test_passes_come_to_rest(given_servings: list[Serving], free: list[int]) -> None:
    """With the same demand, pass after pass: a step takes at least a tenth off, so there are few."""
    now = [replace(s, demand=replace(s.demand, compute=min(s.demand.compute, 0.9))) for s in given_servings]
    tame = [replace(s, demand=replace(s.demand, pressure=min(s.demand.pressure, 20.0))) for s in now]
    num_steps = 0
    for _ in range(60):
        verdict = run(tame, free, most=2)
        moves = {step.model: step.target for step in verdict.steps if step.kind == "move"}
        if not moves:
            return
        num_steps += len(moves)
        tame = [replace(s, device=moves.get(s.demand.model, s.device)) for s in tame]
    raise AssertionError(f"still moving after {num_steps} moves")


@settings(derandomize=True, database=None, max_examples=300, deadline=None)
@given(
    demands=st.lists(
        st.builds(
            lambda number, part, weights, kv, w, c: Demand(
                f"m{number}", weights, weights + kv, w, DEVICES, c, part
            ),
            st.integers(0, 5),
            st.integers(0, 2),
            st.integers(0, 60),
            st.integers(1, 30),
            st.floats(0, 50),
            st.floats(0, 1),
        ),
        max_size=14,
        unique_by=lambda d: (d.model, d.part),
    ),
    free=rooms,
)
def test_packing_keeps_budgets_and_parts_of_a_model_apart(demands: list[Demand], free: list[int]) -> None:
    packing = pack(demands, places(free), 1.0)
    room = dict(zip(DEVICES, free, strict=True))
    there = defaultdict(list)
    for demand, device in zip(demands, packing.devices, strict=True):
        if device is not None:
            room[device] -= demand.needed_bytes
            there[device].append(demand.model)
    assert all(left >= 0 for left in room.values())
    assert all(len(models) == len(set(models)) for models in there.values())
    for demand, device in zip(demands, packing.devices, strict=True):
        if device is None:
            assert all(demand.needed_bytes > room[d] or demand.model in there[d] for d in DEVICES)
