"""Any trace on any small fleet: nothing crashes, no budget is exceeded, and the same again gives the same."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.schedulers.replay import policies
from prism_sgl.schedulers.replay.spec import Arrival
from tests.schedulers.fleets import fleet, spec

NAMES = ("a", "b", "c")
ARRIVALS = st.lists(
    st.builds(
        Arrival,
        at_s=st.floats(0.0, 120.0),
        model=st.sampled_from(NAMES),
        prompt_tokens=st.integers(1, 600),
        output_tokens=st.integers(1, 400),
    ),
    max_size=40,
).map(lambda listed: sorted(listed, key=lambda arrival: arrival.at_s))


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(policies.NAMES),
    arrivals=ARRIVALS,
    copies=st.integers(1, 8),
    devices=st.integers(1, 2),
    device_mib=st.integers(3300, 11000),
    wide=st.booleans(),
)
def test_trace_never_crashes_a_policy(
    policy: str, arrivals: list[Arrival], copies: int, devices: int, device_mib: int, wide: bool
) -> None:
    models = [spec(name) for name in NAMES]
    if wide:  # one model over both devices; over one it has room nowhere
        models[0] = replace(models[0], tp=2)
    over = fleet(*models, devices=devices, device_mib=device_mib)
    listed = [arrival for arrival in arrivals for _ in range(copies)]
    logs = set()
    for _ in range(2):
        # check=True: all invariants after each step, budgets of devices among them.
        tuning = policies.tunings(policy, over, listed, tries=1, check=True)[0]
        replayed = tuning.replay(listed, lambda done: None)
        assert len(replayed.outcomes) == len(listed)
        for outcome in replayed.outcomes:
            assert bool(outcome.failure) == (outcome.ended_at is None)
            if outcome.ended_at is not None:
                assert outcome.first_at is not None
                assert outcome.arrived_at < outcome.first_at <= outcome.ended_at
        logs.add((replayed.log, tuple(o.ended_at for o in replayed.outcomes)))
    assert len(logs) == 1
