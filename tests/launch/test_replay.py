"""Loaders refuse by name; the commands run end to end on a small fleet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from prism_sgl.errors import ConfigError
from prism_sgl.launch.cli import cli
from prism_sgl.launch.replay import fleet_file, measurements, plot, trace_file
from prism_sgl.launch.replay.runs import Run, Runner

ROOT = Path(__file__).parents[2]
ARENA = ROOT / "benchmarks" / "sim" / "data" / "arena_chat.csv"
FLEET = """
devices = 2
memory = "40GiB"
[models.large]
weights = "14.96GiB"
kv_bytes_per_token = 131072
trace_model = 0
[models.small]
weights = "2.30GiB"
kv_bytes_per_token = 32768
trace_model = 1
"""
TRACE = "arrival_s,model,prompt_tokens,output_tokens\n" + "".join(
    f"{number * 0.5},{number % 2},{20 + number},{30 + number}\n" for number in range(40)
)


@pytest.fixture(scope="module")
def measured() -> measurements.Measured:
    return measurements.read()


def write(folder: Path, fleet: str = FLEET, trace: str = TRACE) -> tuple[Path, Path]:
    files = folder / "fleet.toml", folder / "trace.csv"
    files[0].write_text(fleet)
    files[1].write_text(trace)
    return files


def fails(*words: str) -> pytest.RaisesExc[ConfigError]:
    return pytest.raises(ConfigError, match=".*".join(words))


# ------------------------------------------------------------ fleets


@pytest.mark.parametrize(
    ("name", "models", "devices"), [("8_models_2_gpus", 8, 2), ("58_models_32_gpus", 58, 32), ("demo", 3, 1)]
)
def test_shipped_fleets_load_and_have_their_part_of_the_trace(
    name: str, models: int, devices: int, measured: measurements.Measured
) -> None:
    fleet = fleet_file.load(ROOT / "examples" / f"fleet_{name}.toml", measured).fleet
    assert (len(fleet.models), fleet.num_devices) == (models, devices)
    assert trace_file.arrivals(trace_file.load(ARENA), fleet, 1.0)


def test_eight_models_have_754_requests_as_the_prototype_has(measured: measurements.Measured) -> None:
    fleet = fleet_file.load(ROOT / "examples" / "fleet_8_models_2_gpus.toml", measured).fleet
    trace = trace_file.load(ARENA)
    assert len(trace_file.arrivals(trace, fleet, 1.0)) == 754
    assert len(trace_file.arrivals(trace, fleet, 3.0)) == 3 * 754


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("trace_model = 0", "trace_modle = 0", ("models.large.trace_modle", "did you mean trace_model")),
        ('weights = "2.30GiB"', "", ("models.small.weights", "is missing", "give")),
        ("devices = 2", "gpus = 2", ("gpus", "is not a known key")),
        ('memory = "40GiB"', "", ("memory", "is missing", "give")),
        ('memory = "40GiB"', 'memory = "4GiB"', ("models.large.weights", "do not fit", "raise")),
        ("trace_model = 1", "trace_model = 1\ntp = 3", ("models.small.tp", "is 3", "give")),
        ("= 32768", "= 200_000_000", ("models.small.kv_bytes_per_token", "is 200000000", "give")),
    ],
)
def test_wrong_fleet_is_named_by_key_and_remedy(
    tmp_path: Path, measured: measurements.Measured, old: str, new: str, words: tuple[str, ...]
) -> None:
    path, _ = write(tmp_path, fleet=FLEET.replace(old, new))
    with fails(*words):
        fleet_file.load(path, measured)


def test_fleet_that_is_missing_is_told(tmp_path: Path, measured: measurements.Measured) -> None:
    with fails("none.toml: the file", "cannot be read", "give the path of a fleet"):
        fleet_file.load(tmp_path / "none.toml", measured)


# ------------------------------------------------------------ traces


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("1.0,0,5", ("line 3", "has 3 columns", "give four")),
        ("soon,0,5,5", ("line 3", "arrival_s 'soon'", "seconds")),
        ("nan,0,5,5", ("line 3", "arrival_s 'nan'")),
        ("-1,0,5,5", ("line 3", "arrival_s '-1'")),
        ("1.0,x,5,5", ("line 3", "model 'x'")),
        ("1.0,0,0,5", ("line 3", "prompt_tokens '0'", "1 or more")),
        ("1.0,0,5,1.5", ("line 3", "output_tokens '1.5'")),
    ],
)
def test_bad_row_is_named_by_line(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    _, path = write(tmp_path, trace=f"arrival_s,model,prompt_tokens,output_tokens\n0,0,5,5\n{line}\n")
    with fails(*words):
        trace_file.load(path)


def test_wrong_header_and_empty_trace_are_refused(tmp_path: Path) -> None:
    _, path = write(tmp_path, trace="a,b,c,d\n1,2,3,4\n")
    with fails("line 1", "begin with arrival_s"):
        trace_file.load(path)
    path.write_text("arrival_s,model,prompt_tokens,output_tokens\n")
    with fails("line 2", "is missing"):
        trace_file.load(path)
    with fails("the file", "cannot be read"):
        trace_file.load(tmp_path / "none.csv")


@pytest.mark.parametrize("times", [("1764450000", "1764450001"), ("0", "1764450000"), ("1e300",)])
def test_times_of_day_are_refused(tmp_path: Path, times: tuple[str, ...]) -> None:
    rows = "".join(f"{at_s},0,5,5\n" for at_s in times)
    _, path = write(tmp_path, trace=f"arrival_s,model,prompt_tokens,output_tokens\n{rows}")
    with fails("arrival_s goes from 0 to 1", "a week without a request", "subtract the first arrival"):
        trace_file.load(path)


def test_request_longer_than_the_context_is_refused(tmp_path: Path, measured: measurements.Measured) -> None:
    path, _ = write(tmp_path, fleet=FLEET.replace("trace_model = 1", "trace_model = 1\ncontext = 64"))
    fleet = fleet_file.load(path, measured).fleet
    _, trace = write(tmp_path)
    with fails("models.small.context", "is 64", "or more"):
        trace_file.arrivals(trace_file.load(trace), fleet, 1.0)


def test_scale_that_is_not_whole_and_seeds(tmp_path: Path, measured: measurements.Measured) -> None:
    path, csv = write(tmp_path)
    fleet, trace = fleet_file.load(path, measured).fleet, trace_file.load(csv)
    assert len(trace_file.arrivals(trace, fleet, 1.5)) == 60
    assert len(trace_file.arrivals(trace, fleet, 0.5)) == 20
    assert trace_file.arrivals(trace, fleet, 1.0, seed=7) == trace_file.arrivals(trace, fleet, 1.0, seed=7)
    assert trace_file.arrivals(trace, fleet, 1.0, seed=7) != trace_file.arrivals(trace, fleet, 1.0, seed=8)


# ------------------------------------------------------------ costs


def test_an_8b_costs_what_was_measured(measured: measurements.Measured) -> None:
    large = measurements.costs(
        measured, weights_bytes=int(14.96 * (1 << 30)), kv_bytes_per_token=131072, context_tokens=4096
    )
    assert large.step_s == pytest.approx(0.0063, rel=0.05)  # TPOT at low load
    assert large.wake_s == pytest.approx(0.29, rel=0.1)  # 0.33 s to the first token less 40 ms
    full = large.decode_s(128, 128 * 384)
    assert full == pytest.approx(0.0114, rel=0.05)  # TPOT at full load


def test_an_8b_costs_less_on_the_card_with_more_bandwidth(measured: measurements.Measured) -> None:
    size = {"weights_bytes": int(14.96 * (1 << 30)), "kv_bytes_per_token": 131072, "context_tokens": 4096}
    h200 = measurements.costs(measurements.read(measurements.CARDS["h200"]), **size)
    assert h200.step_s == pytest.approx(0.00477, rel=0.02)  # TPOT at low load
    assert h200.step_s < 0.8 * measurements.costs(measured, **size).step_s


@pytest.mark.parametrize("content", ["", "{}", '{"card": "x", "sources": {}, "costs": {"bytes_per_s": 1}}'])
def test_a_file_that_has_no_costs_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "costs.json"
    with fails("cannot be read", "benchmarks.gpu.costs"):
        measurements.read(path)
    path.write_text(content)
    with fails("is no file of costs", "benchmarks.gpu.costs"):
        measurements.read(path)


# ------------------------------------------------------------ commands


def test_replay_writes_the_json_of_each_run(tmp_path: Path) -> None:
    fleet, trace = write(tmp_path)
    out = tmp_path / "out.json"
    result = CliRunner().invoke(
        cli,
        f"replay --fleet {fleet} --trace {trace} --policy prism,static,muxserve --rate-scale 1,2 --slo-scale 5 "
        f"--gpus 1,2 --tries 2 --repeats 2 --json {out}".split(),
    )
    assert result.exit_code == 0, result.output
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == 12
    wanted = {"policy", "rate_scale", "slo_scale", "gpus", "requests", "failed", "ttft_attainment"}
    wanted |= {"tpot_attainment", "ttft_p50_s", "ttft_p99_s", "migrations", "wakes", "gpu_busy"}
    assert all(wanted <= set(run) for run in runs)
    assert {run["requests"] for run in runs} == {40, 80}
    assert "muxserve" in result.output


def test_costs_are_of_a_card_that_is_named_or_of_a_file(tmp_path: Path) -> None:
    fleet, trace = write(tmp_path)
    ttfts = {}
    for costs in ("h100", "h200", str(measurements.CARDS["h200"])):
        out = tmp_path / "out.json"
        command = f"replay --fleet {fleet} --trace {trace} --policy muxserve --costs {costs} --json {out}"
        result = CliRunner().invoke(cli, command.split())
        assert result.exit_code == 0, result.output
        ttfts[costs] = json.loads(out.read_text())["runs"][0]["ttft_p50_s"]
    assert ttfts["h100"] > ttfts["h200"] == ttfts[str(measurements.CARDS["h200"])]
    command = f"replay --fleet {fleet} --trace {trace} --costs h300"
    with fails("h300", "cannot be read", r"name a card \(h100, h200\)"):
        CliRunner().invoke(cli, command.split(), catch_exceptions=False)


def test_plan_finds_the_fewest_devices(tmp_path: Path) -> None:
    fleet, trace = write(tmp_path)
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(
        cli,
        f"plan --fleet {fleet} --trace {trace} --policy prism,muxserve --target 0.9 --tries 1 --json {out}".split(),
    )
    assert result.exit_code == 0, result.output
    plans = {plan["policy"]: plan["gpus_needed"] for plan in json.loads(out.read_text())["plans"]}
    assert plans == {"prism": 1, "muxserve": 1}


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--policy", "prims", "no policy"),
        ("--rate-scale", "0", "0.01 or more"),
        ("--gpus", "1.5", "whole numbers"),
    ],
)
def test_wrong_option_is_told(tmp_path: Path, option: str, value: str, told: str) -> None:
    fleet, trace = write(tmp_path)
    result = CliRunner().invoke(cli, ["replay", "--fleet", str(fleet), "--trace", str(trace), option, value])
    assert result.exit_code == 2
    assert told in result.output


@pytest.mark.parametrize("command", ["replay", "plan"])
def test_rate_at_which_no_request_arrives_is_an_error(tmp_path: Path, command: str) -> None:
    fleet, trace = write(tmp_path)
    words = f"{command} --fleet {fleet} --trace {trace} --policy prism --rate-scale 0.01"
    with fails("--rate-scale is 0.01", "no request arrives"):
        CliRunner().invoke(cli, words.split(), catch_exceptions=False)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(plot.PlotError, match="pip install matplotlib"):
        plot.drawer()


def test_slo_base_is_what_the_model_does_alone(tmp_path: Path, measured: measurements.Measured) -> None:
    fleet, trace = write(tmp_path)
    runner = Runner(fleet_file.load(fleet, measured), trace_file.load(trace))
    assert 0.01 < runner.bases["small"].ttft_s < runner.bases["large"].ttft_s < 0.06
    assert runner.run("muxserve", 1.0, 1.5, 2).summary.ttft_attainment > 0.95


def test_fewest_devices_are_found_though_more_may_be_worse(
    tmp_path: Path, measured: measurements.Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, trace = write(tmp_path)
    runner = Runner(fleet_file.load(fleet, measured), trace_file.load(trace))
    run = runner.run("prism", 1.0, 5.0, 2)
    attainments = {1: 0.5, 2: 0.98, 3: 0.995, 4: 0.9, 5: 0.97, 6: 0.98, 7: 0.999, 8: 1.0}

    def as_said(policy: str, rate: float, slo: float, gpus: int) -> Run:
        return replace(run, gpus=gpus, summary=replace(run.summary, ttft_attainment=attainments[gpus]))

    monkeypatch.setattr(runner, "run", as_said)
    count, found = runner.fewest_gpus("prism", 1.0, 5.0, 0.99, 8)
    assert (count, found.gpus) == (3, 3)
    count, found = runner.fewest_gpus("prism", 1.0, 5.0, 0.99, 2)
    assert (count, found.gpus) == (None, 2)
