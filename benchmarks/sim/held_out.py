"""Traces that are none of the figures', for choosing rules: python -m benchmarks.sim.held_out [8|58|against ...]

8: two devices; eight of Arena-Chat's models by lot, new traces like Hyperbolic's, all models busy. 58: the fleet of 58
with the trace's models dealt out anew, and a new trace like Hyperbolic's. Prints TTFT attainment of prism, in brackets
its moves and wakes. against: on the traces of 8, at SLO scales 5 and 2, prism beside static and paper, which get the
best of four tunings on each. Six minutes of one core.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.sim import generate
from benchmarks.sim.figures import SLO_SCALE, TRACE, busy_trace, runner, shipped
from prism_sgl.launch.replay import trace_file
from prism_sgl.launch.replay.runs import Runner
from prism_sgl.launch.replay.trace_file import Trace
from prism_sgl.schedulers.replay.outcomes import Summary

_LEAST_REQUESTS = 20  # of a model that may be drawn
_MOST_RATE = 8.0  # against others
_SHIFT_S = 200.0  # between models of the 58 that live on one part of the trace


def hyperbolic_like(seed: int, seconds: float) -> Trace:
    """The first seconds of a new one."""
    rows = tuple(row for row in generate.generate(seed) if row.at_s < seconds)
    return Trace(f"like Hyperbolic's, seed {seed}", rows)


def eight(seed: int, trace: Trace) -> Runner:
    """The fleet of eight, each on the part of a model that the lot has chosen."""
    counts = Counter(row.model for row in trace.rows)
    drawn = random.Random(seed).sample([n for n in sorted(counts) if counts[n] >= _LEAST_REQUESTS], 8)
    return _dealt("8_models_2_gpus", trace, [(number, 0.0) for number in drawn])


def fifty_eight(seed: int, trace: Trace) -> Runner:
    """The fleet of 58, the trace's models dealt out in a new order, each time all of them ``_SHIFT_S`` later."""
    lot, numbers = random.Random(seed), sorted({row.model for row in trace.rows})
    parts: list[tuple[int, float]] = []
    while len(parts) < 58:
        order = numbers[:]
        lot.shuffle(order)
        shift_s = _SHIFT_S * (len(parts) // len(numbers))
        parts += [(number, shift_s) for number in order]
    return _dealt("58_models_32_gpus", trace, parts)


def _dealt(fleet: str, trace: Trace, parts: Sequence[tuple[int, float]]) -> Runner:
    file = shipped(fleet)
    models = tuple(
        replace(spec, trace_model=number, trace_shift_s=shift_s)
        for spec, (number, shift_s) in zip(file.fleet.models, parts, strict=False)
    )
    return Runner(replace(file, fleet=replace(file.fleet, models=models)), trace)


def on_two_devices() -> Iterator[tuple[str, list[Runner], tuple[float, ...]]]:
    arena = trace_file.load(TRACE)
    yield "Arena-Chat by lot", [eight(seed, arena) for seed in range(5, 11)], (4.0, 8.0, 16.0)
    like = [eight(seed, hyperbolic_like(seed, 1200.0)) for seed in (11, 12, 13)]
    yield "like Hyperbolic's", like, (2.0, 4.0)
    busy = [runner("8_models_2_gpus", busy_trace(seed)) for seed in range(5, 9)]
    yield "all busy", busy, (2.0, 4.0, 8.0)


def main(names: list[str]) -> None:
    if "8" in names:
        for what, runners, rates in on_two_devices():
            runs = [over.run("prism", rate, SLO_SCALE, 2) for over in runners for rate in rates]
            mean = statistics.fmean(run.summary.ttft_attainment for run in runs)
            print(f"{what}: {mean:.4f}; {', '.join(_seen(run.summary) for run in runs)}", flush=True)
    if "against" in names:
        for what, runners, rates in on_two_devices():
            for slo in (SLO_SCALE, 2.0):
                points = [(over, rate) for over in runners for rate in rates if rate <= _MOST_RATE]
                for policy in ("prism", "static", "paper"):
                    shown = [over.run(policy, rate, slo, 2).summary for over, rate in points]
                    ttft = statistics.fmean(s.ttft_attainment for s in shown)
                    tpot = statistics.fmean(s.tpot_attainment for s in shown)
                    each = ", ".join(_seen(summary) for summary in shown)
                    print(f"{what}, SLO {slo:g}, {policy}: {ttft:.4f}, TPOT {tpot:.4f}; {each}", flush=True)
    if "58" in names:
        arena = trace_file.load(TRACE)
        deals = [(f"deal {seed}", fifty_eight(seed, arena), 4.0) for seed in (5, 6)]
        deals.append(("like Hyperbolic's", fifty_eight(7, hyperbolic_like(7, 700.0)), 2.0))
        for what, over, rate in deals:
            for devices in (8, 10, 12, 14, 16, 18, 20):
                summary = over.run("prism", rate, SLO_SCALE, devices).summary
                print(f"58 models, {what}, {devices} devices: {_seen(summary)}", flush=True)


def _seen(summary: Summary) -> str:
    return f"{summary.ttft_attainment:.4f} ({summary.migrations}, {summary.wakes})"


if __name__ == "__main__":
    main(sys.argv[1:] or ["8", "58", "against"])
