"""No request starves: with finite demand, on any fleet each of whose models fits alone, all are answered in time.

Models over several devices are those for which it is hard: they must have the memory of all their devices at once.
"""

from __future__ import annotations

import random
from bisect import bisect
from dataclasses import replace
from itertools import accumulate

from hypothesis import example, given, settings
from hypothesis import strategies as st

from prism_sgl.config import ServerConfig
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spec import Arrival, ModelSpec
from tests.schedulers.fleets import COSTS, MIB, fleet, spec

ASLEEP_MIB = 400
AWAKE_MIB = 3248
# A turn is due after 10 s, ends after 10 s more, and whoever woke stays for 2 s; sleep, wake and retries beside that.
TURN_S = 25.0
SPAN_S = 25.0
# Of requests, one after the other. With all turns it is less than activation_timeout, after which one is refused.
MOST_WORK_S = 400.0


def alone_s(arrival: Arrival) -> float:
    prefill_s = COSTS.pass_s + arrival.prompt_tokens * COSTS.prefill_s_per_token
    return COSTS.latency_s + prefill_s + arrival.output_tokens * COSTS.decode_s(1, 0.0)


def named(widths: list[int]) -> list[ModelSpec]:
    return [
        replace(spec(f"m{number}", asleep_bytes=ASLEEP_MIB * MIB), tp=tp) for number, tp in enumerate(widths)
    ]


@st.composite
def fleets(draw: st.DrawFn) -> tuple[list[ModelSpec], int, int]:
    """Models, devices, and MiB of each device: from room for one that is awake to room for most."""
    devices = draw(st.sampled_from((2, 4)))
    widths = draw(st.lists(st.sampled_from((2,) if devices == 2 else (2, 4)), min_size=1, max_size=3))
    widths += [1] * draw(st.integers(0, 4))
    models = named(widths)
    least_mib = AWAKE_MIB + ASLEEP_MIB * (len(models) - 1)
    more_awake = draw(st.floats(0.0, 2.5))
    return models, devices, least_mib + int(more_awake * (AWAKE_MIB - ASLEEP_MIB))


@settings(max_examples=100, deadline=None)
@given(made=fleets(), seed=st.integers(0, 2**32))
# A model with a spare was set aside, and then woken on the other device: its answers stayed on the first.
@example(made=(named([2, 2, 2, 1]), 2, 4448), seed=212)
def test_every_request_is_answered_within_a_bound(made: tuple[list[ModelSpec], int, int], seed: int) -> None:
    models, devices, device_mib = made
    noise = random.Random(seed)
    arrivals = []
    for model in models:
        every_s, longest = noise.choice((0.2, 0.5, 1.0, 3.0)), noise.choice((20, 200, 600))
        at_s = 0.0
        while (at_s := at_s + noise.expovariate(1 / every_s)) < SPAN_S:
            tokens = noise.randint(1, 300), noise.randint(1, longest)
            arrivals.append(Arrival(at_s, model.name, *tokens))
    arrivals.sort(key=lambda arrival: (arrival.at_s, arrival.model))
    work_s = list(accumulate(map(alone_s, arrivals)))
    arrivals = arrivals[: bisect(work_s, MOST_WORK_S)]
    # A turn of each model, and all requests one after the other.
    bound_s = TURN_S * len(models) + sum(map(alone_s, arrivals))
    assert bound_s < ServerConfig().activation_timeout_s
    over = fleet(*models, devices=devices, device_mib=device_mib)
    for outcome in replay_prism(over, arrivals, drain_s=bound_s).outcomes:
        assert outcome.ended_at is not None, outcome
        assert outcome.ended_at - outcome.arrived_at <= bound_s
