from __future__ import annotations

import pytest

from prism_sgl.schedulers.latency import AnswerLength, LatencyEstimate, TokenRate


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


def test_one_outlier_of_a_hundred_times_changes_nothing() -> None:
    def learned(wild: int) -> LatencyEstimate:
        estimate = LatencyEstimate()
        for number, tokens in enumerate((10, 500, 40, 1000, 200, 2000, 80, 700) * 3):
            ttft_s = 0.05 + tokens / 4000
            estimate.observe(tokens, 100 * ttft_s if number == wild else ttft_s)
        return estimate

    for wild in range(24):
        for tokens in (10, 100, 1000):
            assert learned(wild).estimate_s(tokens) == pytest.approx(0.05 + tokens / 4000, rel=0.02)


def test_a_quarter_of_outliers_of_a_hundred_times_is_borne() -> None:
    estimate = LatencyEstimate()
    for number, tokens in enumerate((10, 500, 40, 1000, 200, 2000, 80) * 4):
        ttft_s = 0.05 + tokens / 4000
        estimate.observe(tokens, 100 * ttft_s if number % 4 == 0 else ttft_s)
    for tokens in (100, 1000):
        assert estimate.estimate_s(tokens) == pytest.approx(0.05 + tokens / 4000, rel=0.3)


def test_prefix_hits_lower_the_estimate_and_misses_raise_it_again() -> None:
    estimate = LatencyEstimate()
    for tokens in (100, 1000, 300, 2000) * 4:
        estimate.observe(tokens, 0.01 + tokens / 1000)
    before = estimate.estimate_s(1000)
    for _ in range(100):
        estimate.observe_hits(1000, 800)
    assert estimate.hit_ratio == pytest.approx(0.8)
    assert estimate.estimate_s(1000) == pytest.approx(0.01 + 0.2, rel=0.05)
    for _ in range(100):
        estimate.observe_hits(1000, 0)
    assert estimate.estimate_s(1000) == pytest.approx(before, rel=0.05)


def test_nonsense_in_usage_is_borne() -> None:
    estimate = LatencyEstimate()
    estimate.observe_hits(0, 0)
    assert estimate.hit_ratio == 0.0
    estimate.observe_hits(10, 10_000)
    assert estimate.hit_ratio < 1.0


def test_answers_are_expected_as_long_as_the_last_ones_but_no_longer_than_allowed() -> None:
    answers = AnswerLength()
    assert answers.expect(16) == 16
    assert answers.expect(0) > 0
    for _ in range(100):
        answers.observe(50)
    assert (answers.expect(0), answers.expect(20), answers.expect(1000)) == (50, 20, 50)
    for _ in range(64):
        answers.observe(10)
    assert answers.expect(0) == 10
