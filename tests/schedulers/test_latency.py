from __future__ import annotations

import pytest

from prism_sgl.schedulers.latency import LatencyEstimate, TokenRate


def test_estimate_learns_intercept_and_slope_in_spite_of_outliers() -> None:
    estimate = LatencyEstimate()
    for number, tokens in enumerate((10, 500, 40, 1000, 200, 2000, 80, 700) * 3):
        outlier = 3.0 if number % 5 == 0 else 0.0
        estimate.observe(tokens, 0.05 + tokens / 4000 + outlier)
    assert estimate.alpha_s == pytest.approx(0.05, abs=0.02)
    assert estimate.s_per_token == pytest.approx(1 / 4000, rel=0.2)


def test_prompts_of_one_length_teach_the_intercept_only() -> None:
    estimate = LatencyEstimate()
    for _ in range(10):
        estimate.observe(100, 0.2)
    assert estimate.estimate_s(100) == pytest.approx(0.2)
    assert estimate.estimate_s(200) >= estimate.estimate_s(100)


def test_estimate_is_never_negative() -> None:
    estimate = LatencyEstimate()
    for tokens, ttft_s in ((1000, 0.01), (1, 0.5), (2000, 0.01), (5, 0.4)) * 4:
        estimate.observe(tokens, ttft_s)
    assert estimate.estimate_s(0) >= 0
    assert estimate.estimate_s(100_000) >= 0


def test_rate_is_over_a_sliding_window_in_bounded_memory() -> None:
    rate = TokenRate(60.0)
    for second in range(600):
        rate.add(60, float(second))
    assert rate.per_s(599.0) == pytest.approx(60, rel=0.1)
    assert len(rate._buckets) <= 12
    assert rate.per_s(640.0) == pytest.approx(20, rel=0.3)
    assert rate.per_s(700.0) == 0
