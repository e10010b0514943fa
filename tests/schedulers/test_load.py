from __future__ import annotations

import math

import pytest

from prism_sgl.schedulers.latency import LatencyEstimate
from prism_sgl.schedulers.load import LoadEstimate


def asked(rate: float, prompt_tokens: int = 100, window_s: float = 60.0) -> LoadEstimate:
    load = LoadEstimate(window_s)
    for number in range(round(rate * window_s)):
        load.ask(prompt_tokens, number / rate)
    return load


def latency(alpha_s: float = 0.0, s_per_token: float = 0.0) -> LatencyEstimate:
    estimate = LatencyEstimate()
    estimate.alpha_s, estimate.s_per_token = alpha_s, s_per_token
    return estimate


def test_nothing_is_asked_of_a_model_without_requests() -> None:
    load = LoadEstimate()
    assert load.compute(latency(0.1, 0.1), 100, 0.05, 0.0) == 0.0
    assert load.held_tokens(100, 0.05, 0.0) == 0.0


def test_tokens_of_prompts_add_up_beyond_what_a_device_has() -> None:
    load = asked(rate=10.0, prompt_tokens=200)
    assert load.compute(latency(s_per_token=0.001), 100, 0.05, 59.9) == pytest.approx(2.0)


def test_what_passes_share_never_takes_more_than_all_of_the_time() -> None:
    assert asked(rate=100.0).compute(latency(alpha_s=0.05), 100, 0.05, 59.9) == pytest.approx(
        0.993, abs=0.001
    )
    assert asked(rate=1.0).compute(latency(alpha_s=0.05), 100, 0.05, 59.9) == pytest.approx(0.0488, abs=0.001)


def test_decode_counts_by_how_much_of_the_promised_time_a_step_takes() -> None:
    load = asked(rate=10.0)
    # 101 tokens in 1 s beside one other runtime: steps of 10 ms, of 5 ms alone; somebody decodes all the time.
    load.answered(total_s=1.1, ttft_s=0.1, kv_tokens=200, answer_tokens=101, sharers=2)
    assert load.compute(latency(), 100, 0.05, 59.9) == pytest.approx(0.1, rel=0.01)
    assert load.compute(latency(), 100, 0.005, 59.9) == pytest.approx(1.0, rel=0.01)
    assert load.compute(latency(), 100, 0.001, 59.9) == pytest.approx(1.0, rel=0.01)
    # One in ten seconds, at 50 ms a token: 5 s of it, 0.39 of the time; on a fast device too.
    seldom = asked(rate=0.1)
    seldom.answered(total_s=1.0, ttft_s=0.0, kv_tokens=200, answer_tokens=101, sharers=1)
    assert seldom.compute(latency(), 100, 0.05, 59.9) == pytest.approx(0.394 * 0.2, rel=0.01)


def noise(load: LoadEstimate, now: float, s_per_token: float = 0.001) -> float:
    return load.noise(latency(s_per_token=s_per_token), 100, 0.05, now)


def test_what_is_asked_is_as_sure_as_its_buckets_are_even() -> None:
    assert noise(LoadEstimate(), 0.0) == 0.0
    assert noise(asked(rate=10.0), 59.9) == pytest.approx(0.0, abs=1e-6)
    begun = LoadEstimate()
    for number in range(50):
        begun.ask(100, number / 10)  # one bucket of twelve
    assert noise(begun, 5.0) == pytest.approx(1.0)
    clumps = LoadEstimate()
    for bucket in range(12):
        for _ in range(1 if bucket % 2 else 3):
            clumps.ask(100, bucket * 5.0)
    assert noise(clumps, 59.9) == pytest.approx(math.sqrt((12 * 60 / 24**2 - 1) / 11))


def test_long_prompts_make_uncertain_only_what_prompts_ask_for() -> None:
    load = LoadEstimate()
    for bucket in range(12):
        load.ask(10_000 if bucket == 5 else 10, bucket * 5.0)
    assert noise(load, 59.9) == pytest.approx(1.0, abs=0.05), "one prompt is nearly all that is asked"
    load.answered(total_s=1.0, ttft_s=0.0, kv_tokens=200, answer_tokens=101, sharers=1)
    assert noise(load, 59.9, s_per_token=1e-6) < 0.05, "decode: a request in each bucket"


def test_memory_is_asked_for_as_long_as_answers_take() -> None:
    load = asked(rate=2.0, prompt_tokens=100)
    assert load.held_tokens(100, 0.05, 59.9) == pytest.approx(
        2.0 * 200 * 5.0
    )  # nothing known: as long as promised
    load.answered(total_s=2.0, ttft_s=0.1, kv_tokens=300, answer_tokens=200, sharers=1)
    assert load.held_tokens(100, 0.05, 59.9) == pytest.approx(2.0 * 300 * 2.0)


def test_demand_is_forgotten_after_the_window() -> None:
    load = asked(rate=10.0)
    assert load.compute(latency(0.1), 100, 0.05, 130.0) == 0.0
