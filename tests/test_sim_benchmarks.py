"""The shipped trace has the paper's statistics; the validation fits and chooses its load as it says. No engine here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sim import calibration, cpu_system, generate, validate
from prism_sgl.launch.replay import fleet_file, measurements, trace_file
from prism_sgl.launch.replay.trace_file import Row
from prism_sgl.schedulers.replay.outcomes import summarise

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def rows() -> tuple[Row, ...]:
    return trace_file.load(generate.FILE).rows


def test_shipped_trace_is_what_the_generator_makes(rows: tuple[Row, ...], tmp_path: Path) -> None:
    again = tmp_path / "again.csv"
    generate.write(again, generate.generate())
    assert again.read_bytes() == generate.FILE.read_bytes()
    assert generate.FILE.stat().st_size < 1_000_000
    assert generate.generate(1) != list(rows)


@pytest.mark.parametrize("statistic", generate.PUBLISHED)
def test_trace_has_the_published_statistics(statistic: str, rows: tuple[Row, ...]) -> None:
    published = generate.PUBLISHED[statistic]
    assert published.low <= generate.measure(rows)[statistic] <= published.high


def test_statistics_of_a_trace_that_can_be_counted_by_hand() -> None:
    # Model 1: a request each second of ten minutes. Model 2: three, 200 s apart, each active for 120 s.
    rows = [Row(float(second), 1, 1, 1) for second in range(600)]
    rows += [Row(at_s, 2, 1, 1) for at_s in (5.0, 205.0, 405.0)]
    found = list(generate.measure(rows, 600.0).values())
    assert found[0] == 2
    assert found[1] == pytest.approx((1 + 360 / 600) / 2)
    assert found[2] == pytest.approx((1 + 6) * 6)  # an hour is six of these; the first lasts until the end
    assert found[3] == pytest.approx((0 + 57 / 60) / 2)
    assert found[4] == 0.0  # none, and 3 gaps in ten minutes: 18 an hour
    assert found[5] == 0.5


def test_both_shipped_traces_fit_the_fleet_of_eight() -> None:
    measured = measurements.read()
    fleet = fleet_file.load(ROOT / "examples" / "fleet_8_models_2_gpus.toml", measured).fleet
    for name in ("arena_chat", "hyperbolic_like"):
        trace = trace_file.load(ROOT / "benchmarks" / "sim" / "data" / f"{name}.csv")
        assert len({arrival.model for arrival in trace_file.arrivals(trace, fleet, 1.0)}) == 8


# ------------------------------------------------------------ validation

COSTS = calibration.Calibration(
    latency_s=0.01,
    pass_s=0.02,
    prefill_s_per_token=0.002,
    step_s=0.03,
    step_s_per_request=0.005,
    step_s_per_token=0.00001,
    wake_s=0.3,
    sleep_s=0.03,
    shared_ratio=2.0,
    ttft_left=0.0,
    tpot_left=0.0,
)


def test_fit_finds_the_costs_that_made_the_samples_and_none_below_zero() -> None:
    samples = {
        (1.0, float(b), float(t)): 0.03 + 0.005 * b + 1e-5 * t for b in (1, 2, 4) for t in (24, 216, 900)
    }
    assert calibration.fit(samples) == pytest.approx([0.03, 0.005, 1e-5])
    falling = {(1.0, 10.0): 0.5, (1.0, 100.0): 0.4}
    assert calibration.fit(falling)[1] == 0.0


def test_one_slow_repeat_does_not_count() -> None:
    samples = [((1.0, 8.0), seconds) for seconds in (0.1, 0.11, 3.0)]
    assert calibration.medians(samples) == {(1.0, 8.0): 0.11}


def test_load_is_chosen_by_the_simulation_alone() -> None:
    rate, slo = validate.choose_load(COSTS)
    replayed = validate.simulate(validate.simulated_fleet(COSTS, slo), validate.validation_trace(rate))
    summary = summarise(replayed, dict.fromkeys(cpu_system.MODELS, slo))
    assert summary.gpu_busy == pytest.approx(validate.BUSY, abs=0.02)
    assert summary.ttft_attainment == pytest.approx(validate.AIM, abs=0.02)
    assert summary.tpot_attainment == pytest.approx(validate.AIM, abs=0.02)
    assert {len(models) for models in replayed.placement.values()} == {2}


def test_validated_trace_is_another_one_than_the_calibration() -> None:
    calibrated, _ = calibration.calibration_trace("alpha", 0.0)
    validated = validate.validation_trace(1.5)
    assert validated == validate.validation_trace(1.5)
    assert {arrival.model for arrival in validated} == set(cpu_system.MODELS)
    lengths = {arrival.prompt_tokens for arrival in validated}
    assert len(lengths - {arrival.prompt_tokens for arrival in calibrated}) > 50
    assert max(a.prompt_tokens + a.output_tokens for a in validated) <= cpu_system.CONTEXT_TOKENS
