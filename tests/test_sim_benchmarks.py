"""The shipped trace is what its generator makes, and has the statistics that the paper publishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sim import generate
from prism_sgl.launch.replay import fleet_file, measurements, trace_file
from prism_sgl.launch.replay.trace_file import Row

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
    measured = measurements.read(ROOT / "benchmarks" / "results" / "gpu")
    fleet = fleet_file.load(ROOT / "examples" / "fleet_8_models_2_gpus.toml", measured).fleet
    for name in ("arena_chat", "hyperbolic_like"):
        trace = trace_file.load(ROOT / "benchmarks" / "sim" / "data" / f"{name}.csv")
        assert len({arrival.model for arrival in trace_file.arrivals(trace, fleet, 1.0)}) == 8
