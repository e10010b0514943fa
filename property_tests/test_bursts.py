"""Hops of idle models: no rule leads there and back, and whatever is asked, wakes are bounded."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.config import SchedulerConfig
from prism_sgl.schedulers.bursts import Option, better
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spec import Arrival
from tests.schedulers.fleets import fleet, spec

NAMES = ("a", "b", "c", "d")
SECONDS = st.floats(0.0, 10.0)
OPTIONS = st.builds(Option, device=st.just("d"), num_beside=st.integers(0, 9), first_s=SECONDS)


@given(one=OPTIONS, other=OPTIONS, left_s=st.floats(-10.0, 10.0))
def test_no_two_devices_are_each_better_than_the_other(one: Option, other: Option, left_s: float) -> None:
    assert better(one, other, left_s) is None or better(other, one, left_s) is None


@settings(max_examples=30, deadline=None)
@given(
    arrivals=st.lists(
        st.builds(
            Arrival,
            at_s=st.floats(0.0, 60.0),
            model=st.sampled_from(NAMES),
            prompt_tokens=st.integers(1, 600),
            output_tokens=st.integers(1, 100),
        ),
        max_size=120,
    ).map(lambda listed: sorted(listed, key=lambda arrival: arrival.at_s)),
    device_mib=st.sampled_from((14_000, 18_000, 30_000)),
)
def test_wakes_are_bounded_whatever_is_asked(arrivals: list[Arrival], device_mib: int) -> None:
    """A model that woke stays for its residence; none is woken twice for one burst."""
    over = fleet(*(spec(name) for name in NAMES), devices=2, device_mib=device_mib)
    replayed = replay_prism(over, arrivals, check=True)
    assert all(not outcome.failure for outcome in replayed.outcomes)
    asked = Counter(arrival.model for arrival in arrivals)
    ends = max((o.ended_at or 0.0 for o in replayed.outcomes), default=0.0)
    stays = ends / SchedulerConfig().min_residence_s + 1
    assert replayed.wakes <= sum(min(count, stays) for count in asked.values())
