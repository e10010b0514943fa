"""The paper's headline figures in simulation: python -m benchmarks.sim.figures [FIGURE ...]

Costs come from benchmarks/results/gpu, what is not measured is listed by name in every result. Traces, SLO scale and
seeds stand here, before any run; baselines get the best of their tunings, prism runs with the live defaults. Results:
benchmarks/results/sim/<figure>.json. About ten minutes of one core for all.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prism_sgl.config import SchedulerConfig
from prism_sgl.launch.replay import fleet_file, measurements, trace_file
from prism_sgl.launch.replay.runs import Run, Runner
from prism_sgl.launch.replay.trace_file import Row, Trace
from prism_sgl.schedulers.replay import policies
from prism_sgl.schedulers.replay.outcomes import summarise
from prism_sgl.schedulers.replay.prism import replay_prism

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TRACE = ROOT / "benchmarks" / "sim" / "data" / "arena_chat.csv"
HYPERBOLIC = ROOT / "benchmarks" / "sim" / "data" / "hyperbolic_like.csv"
POLICIES = ("prism", "static", "muxserve", "paper")
SLO_SCALE = 5.0  # the prototype's default
TARGET = 0.99
REPEATS = 3


def shipped(fleet: str) -> fleet_file.FleetFile:
    return fleet_file.load(ROOT / "examples" / f"fleet_{fleet}.toml", measurements.read())


def runner(fleet: str, trace: Trace | None = None, repeats: int = 1) -> Runner:
    return Runner(shipped(fleet), trace or trace_file.load(TRACE), repeats=repeats)


def requests_at_target() -> dict[str, Any]:
    """8 models on 2 devices: the largest rate scale at which 99 % of the requests meet their TTFT SLO."""
    return _requests_at_target(runner("8_models_2_gpus"))


def requests_at_target_hyperbolic() -> dict[str, Any]:
    """The same on the trace with Hyperbolic's published statistics (benchmarks/sim/generate.py)."""
    return _requests_at_target(runner("8_models_2_gpus", trace_file.load(HYPERBOLIC)))


def _requests_at_target(over: Runner) -> dict[str, Any]:
    rows = {}
    for policy in POLICIES:
        rate, run = over.most_rate(policy, SLO_SCALE, 2, TARGET)
        rows[policy] = {"rate_scale": rate, "run": None if run is None else run.as_json()}
        print(f"  {policy}: {rate:g}", flush=True)
    ours = rows["prism"]["rate_scale"]
    return {
        "rows": rows,
        "against_static": _ratio(ours, rows["static"]["rate_scale"]),
        "against_muxserve": _ratio(ours, rows["muxserve"]["rate_scale"]),
        "targets": {"against_static": "> 3.5", "against_muxserve": "> 2.3"},
    }


def equal_gpus() -> dict[str, Any]:
    """Attainment of all policies over rate and SLO scale; where ours is best against others."""
    return _equal_gpus(
        runner("8_models_2_gpus", repeats=REPEATS), (1.0, 2.0, 4.0, 8.0), (*POLICIES, "prototype")
    )


def equal_gpus_hyperbolic() -> dict[str, Any]:
    """The same on the trace like Hyperbolic's."""
    over = runner("8_models_2_gpus", trace_file.load(HYPERBOLIC), repeats=REPEATS)
    return _equal_gpus(over, (1.0, 2.0, 4.0), POLICIES)


def _equal_gpus(over: Runner, rates: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    runs: list[Run] = []
    for gpus in (1, 2):
        for slo in (2.0, 5.0, 10.0):
            for rate in rates:
                runs += [over.run(policy, rate, slo, gpus) for policy in names]
                shown = (f"{run.policy} {run.summary.ttft_attainment:.4f}" for run in runs[-len(names) :])
                print(f"  {gpus} devices, SLO {slo:g}, x{rate:g}: {', '.join(shown)}", flush=True)
    largest = {
        "against all": _largest(runs, ("static", "muxserve", "paper", "prototype")),
        "against static and muxserve": _largest(runs, ("static", "muxserve")),
    }
    print(f"  {largest}", flush=True)
    return {
        "runs": [run.as_json() for run in runs],
        "largest": largest,
        "targets": {"largest ratio": "> 3.3"},
    }


def _largest(runs: list[Run], others: tuple[str, ...]) -> dict[str, Any]:
    """The point at which ours is the most times the best of the others."""
    best: dict[str, Any] = {"ratio": 0.0}
    for ours in (run for run in runs if run.policy == "prism"):
        point = (ours.gpus, ours.slo_scale, ours.rate_scale)
        beside = [r for r in runs if r.policy in others and (r.gpus, r.slo_scale, r.rate_scale) == point]
        other = max(beside, key=lambda run: run.summary.ttft_attainment)
        ratio = _ratio(ours.summary.ttft_attainment, other.summary.ttft_attainment) or 0.0
        if ratio > best["ratio"]:
            best = {"ratio": ratio, "gpus": point[0], "slo_scale": point[1], "rate_scale": point[2]}
            best |= {"ours": ours.summary.ttft_attainment, "other": other.policy}
            best |= {"its": other.summary.ttft_attainment}
    return best


def gpus_at_target() -> dict[str, Any]:
    """58 models: devices needed for 99 %, at rate scale 4."""
    over = runner("58_models_32_gpus")
    rows = {}
    for policy in ("prism", "muxserve", "paper"):
        count, run = over.fewest_gpus(policy, 4.0, SLO_SCALE, TARGET, 32)
        rows[policy] = {"gpus": count, "run": run.as_json()}
        print(f"  {policy}: {count}", flush=True)
    return {"rows": rows, "targets": {"prism": "half of muxserve's"}}


def busy_trace(seed: int) -> Trace:
    """The eight models of the trace that the small fleet has, all asked all the time."""
    noise = random.Random(seed)
    rows = []
    for model in (2, 14, 3, 10, 5, 19, 23, 24):
        at_s = 0.0
        while (at_s := at_s + noise.expovariate(0.5)) < 300.0:
            prompt = min(1021, max(2, int(noise.lognormvariate(3.9, 1.4))))
            rows.append(Row(at_s, model, prompt, min(977, max(10, int(noise.expovariate(1 / 256))))))
    return Trace("Poisson, 0.5 requests/s a model, 300 s", tuple(sorted(rows, key=lambda row: row.at_s)))


def all_busy() -> dict[str, Any]:
    """Eight models that are asked all the time (where R saw the paper's rule lose 24.6 % to static)."""
    over = runner("8_models_2_gpus", busy_trace(5), repeats=REPEATS)
    runs = [over.run(policy, rate, SLO_SCALE, 2) for rate in (2.0, 4.0, 8.0) for policy in POLICIES]
    for run in runs:
        print(f"  {run.policy} x{run.rate_scale:g}: {run.summary.ttft_attainment:.4f}", flush=True)
    return {"runs": [run.as_json() for run in runs], "targets": {"prism": "never worse than static"}}


def window() -> dict[str, Any]:
    """How prism's attainment depends on [scheduler] prefill_window: no target, a question to the default of 4."""
    over = runner("8_models_2_gpus")
    fleet = over.fleet(SLO_SCALE, 2)
    slos = {spec.name: spec.slo for spec in fleet.models}
    rows = []
    for rate in (4.0, 8.0, 16.0):
        arrivals = over.arrivals(rate)
        for size in (4, 8, 16, 64):
            limits = SchedulerConfig(start_parallel=len(fleet.models), prefill_window=size, spares=True)
            summary = summarise(replay_prism(fleet, arrivals, scheduler=limits), slos)
            row = {"rate_scale": rate, "prefill_window": size, "ttft_attainment": summary.ttft_attainment}
            rows.append(row | {"ttft_p50_s": summary.ttft_p50_s, "ttft_p99_s": summary.ttft_p99_s})
            print(f"  x{rate:g} window {size}: {summary.ttft_attainment:.4f}", flush=True)
    return {"rows": rows}


FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    "requests_at_target": requests_at_target,
    "requests_at_target_hyperbolic": requests_at_target_hyperbolic,
    "equal_gpus": equal_gpus,
    "equal_gpus_hyperbolic": equal_gpus_hyperbolic,
    "gpus_at_target": gpus_at_target,
    "all_busy": all_busy,
    "window": window,
}


def _ratio(ours: float, other: float) -> float | None:
    return ours / other if other else None


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's headline figures in simulation.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; default: all")
    names = parser.parse_args().figures
    if unknown := set(names) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}")
    (RESULTS / "sim").mkdir(exist_ok=True)
    for name in names or list(FIGURES):
        began = time.perf_counter()
        print(name, flush=True)
        content = {
            "name": name,
            "what": FIGURES[name].__doc__,
            "command": f"python -m benchmarks.sim.figures {name}",
            "slo_scale": SLO_SCALE,
            "policies": policies.NOTES,
            "not_measured": measurements.ASSUMED,
            **FIGURES[name](),
            "seconds": round(time.perf_counter() - began, 1),
        }
        (RESULTS / "sim" / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
