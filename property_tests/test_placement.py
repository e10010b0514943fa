"""Placement never promises more than there is."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.schedulers.placement import Choice, Demand, Place, choose, kvpr, plan

DEVICES = ("a", "b", "c")
demand = st.builds(
    lambda name, weights, kv, pressure, devices: Demand(
        name, weights, weights + kv, pressure, tuple(sorted(devices))
    ),
    st.integers(0, 10**6).map(str),
    st.integers(1, 80),
    st.integers(1, 40),
    st.floats(0, 1000),
    st.sets(st.sampled_from(DEVICES)),
)
demands = st.lists(demand, max_size=12, unique_by=lambda d: d.model)
budgets = st.lists(st.integers(10, 200), min_size=1, max_size=3)


def empty(sizes: list[int]) -> list[Place]:
    return [Place(name, size, size) for name, size in zip(DEVICES, sizes, strict=False)]


@settings(derandomize=True, database=None, max_examples=300)
@given(wanted=demands, sizes=budgets)
def test_plan_never_exceeds_a_budget_and_leaves_out_only_what_does_not_fit(
    wanted: list[Demand], sizes: list[int]
) -> None:
    places = empty(sizes)
    chosen = plan(wanted, places)
    assert set(chosen) == {d.model for d in wanted}
    used: dict[str | None, int] = defaultdict(int)
    for d in wanted:
        assert chosen[d.model].device is None or chosen[d.model].device in d.devices
        used[chosen[d.model].device] += d.needed_bytes
    free = {place.device: place.budget_bytes - used[place.device] for place in places}
    assert all(left >= 0 for left in free.values())
    for d in wanted:
        if chosen[d.model].device is None:
            assert chosen[d.model].reason
            assert all(d.needed_bytes > free.get(device, 0) for device in d.devices)


@settings(derandomize=True, database=None, max_examples=300)
@given(
    wanted=demand,
    places=st.lists(
        st.builds(
            lambda name, budget, weights, reclaimable, pressure: Place(
                name, budget, budget - weights, reclaimable, budget, weights, weights, pressure
            ),
            st.sampled_from(DEVICES),
            st.integers(50, 200),
            st.integers(0, 50),
            st.integers(0, 50),
            st.floats(0, 1000),
        ),
        max_size=3,
        unique_by=lambda place: place.device,
    ),
)
def test_choice_has_the_smallest_resulting_pressure_of_those_that_fit(
    wanted: Demand, places: list[Place]
) -> None:
    choice = choose(wanted, places)
    allowed = [place for place in places if place.device in wanted.devices]
    now = [p for p in allowed if wanted.needed_bytes <= p.free_bytes + p.reclaimable_bytes]
    fitting = now or [p for p in allowed if wanted.needed_bytes <= p.possible_bytes]
    if not fitting:
        assert choice == Choice(None, choice.reason)
        return

    def resulting(place: Place) -> float:
        shared = place.budget_bytes - place.awake_weights_bytes - wanted.weights_bytes
        return kvpr(place.pressure + wanted.pressure, shared)

    [best] = [place for place in fitting if place.device == choice.device]
    assert all(resulting(best) <= resulting(place) for place in fitting)
