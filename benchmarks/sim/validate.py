"""Is the simulation right? One fleet, live on this machine's CPU and simulated: python -m benchmarks.sim.validate

Two host devices, each bound to a core of its own so that its models share one machine's time as on a card, and four
small models behind real SGLang engines. A calibration run gives the costs (prefill, decode by batch and context,
sleep, wake). They predict a second, other trace: the simulation chooses its rate, so that devices are busy half of the
time, and the SLO that 80 % then meet; only after that is it played live. Nothing is fitted to what that gives.
Writes benchmarks/results/sim/validation.json; about seven minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.sim.calibration import Calibration, calibrate
from benchmarks.sim.cpu_system import (
    CONTEXT_TOKENS,
    DEVICES,
    FIRST_SLO,
    MAX_RUNNING,
    MODEL_PATH,
    MODELS,
    PASS_TOKENS,
    OtherWork,
    live_system,
    play,
)
from prism_sgl.config import SchedulerConfig
from prism_sgl.schedulers.replay.outcomes import Summary, percentile, summarise, tpot_s, ttft_s
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, ModelCosts, ModelSpec, Outcome, Replayed, Slo

RESULT = Path(__file__).parents[1] / "results" / "sim" / "validation.json"
MIB = 1 << 20
BUSY = 0.5  # of the simulated devices: near 1 a queue's length hangs on the last percent of each cost
AIM = 0.80  # of the simulated attainments; the issue asks for a load at which they lie between 0.60 and 0.95
TRACE_S = 240.0
_KV_BYTES_PER_TOKEN = 23040  # SmolLM2-135M in bfloat16: 30 layers, 3 KV heads of 64
_WEIGHTS_BYTES = 258 * MIB
# The Controller takes a simulated device for a card and counts 2 GiB for an engine before its Hello; the budget of
# the simulated device is larger by as much, so both sides have the same room for KV.
_CARD_BYTES = 2148 * MIB
_DEVICE_BYTES = 1024 * MIB


def simulated_fleet(found: Calibration, slo: Slo = FIRST_SLO) -> Fleet:
    costs = ModelCosts(
        weights_bytes=_WEIGHTS_BYTES,
        overhead_bytes=_CARD_BYTES,
        asleep_bytes=800 * MIB,
        kv_bytes_per_token=_KV_BYTES_PER_TOKEN,
        page_bytes=2 * MIB,
        floor_bytes=12 * MIB,
        context_tokens=CONTEXT_TOKENS,
        latency_s=found.latency_s,
        pass_s=found.pass_s,
        prefill_s_per_token=found.prefill_s_per_token,
        step_s=found.step_s,
        step_s_per_request=found.step_s_per_request,
        step_s_per_token=found.step_s_per_token,
        wake_s=found.wake_s,
        sleep_s=found.sleep_s,
        start_s=1.0,
        map_s_per_page=0.0,
        max_running=MAX_RUNNING,
        pass_tokens=PASS_TOKENS,
    )
    models = tuple(ModelSpec(name, costs, trace_model=number, slo=slo) for number, name in enumerate(MODELS))
    room = _DEVICE_BYTES + len(MODELS) // DEVICES * _CARD_BYTES
    return Fleet("validation", models, DEVICES, room, copy_slowdown=1.0)


def simulate(fleet: Fleet, arrivals: Sequence[Arrival]) -> Replayed:
    return replay_prism(fleet, arrivals, scheduler=SchedulerConfig(start_parallel=len(MODELS)))


def validation_trace(rate: float, seed: int = 11) -> list[Arrival]:
    """Bursts and lulls of each model, ``rate`` requests a second in all; prompts, answers and times of its own.

    The times of one seed keep their pattern: a rate only stretches them.
    """
    noise = random.Random(seed)
    weights, found = (4.0, 3.0, 2.0, 1.0), []
    for name, weight in zip(MODELS, weights, strict=True):
        at, share = 0.0, weight / sum(weights)
        while True:
            busy = noise.random() < 0.5
            for _ in range(noise.randint(2, 8)):
                at += noise.expovariate(share * (2.0 if busy else 0.67))
                prompt = min(320, max(4, round(noise.lognormvariate(4.0, 0.9))))
                found.append(
                    Arrival(at, name, prompt, min(64, max(3, round(noise.lognormvariate(2.8, 0.6)))))
                )
            if at > TRACE_S * 20:
                break
    scaled = sorted((replace(a, at_s=a.at_s / rate) for a in found), key=lambda a: a.at_s)
    return [arrival for arrival in scaled if arrival.at_s < TRACE_S]


def choose_load(found: Calibration) -> tuple[float, Slo]:
    """Requests a second that keep the simulated devices ``BUSY``, and the SLO that ``AIM`` of them meet."""
    low, high = 0.05, 12.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        busy = simulate(simulated_fleet(found), validation_trace(middle)).gpu_busy
        low, high = (low, middle) if busy > BUSY else (middle, high)
    slo = FIRST_SLO
    for _ in range(4):  # the order of requests depends on the SLO, a little
        outcomes = simulate(simulated_fleet(found, slo), validation_trace(low)).outcomes
        slo = Slo(
            percentile(sorted(map(ttft_s, outcomes)), 100 * AIM),
            percentile(sorted(map(tpot_s, outcomes)), 100 * AIM),
        )
    return low, slo


# ------------------------------------------------------------ result


def rows(live: Summary, simulated: Summary) -> list[dict[str, Any]]:
    points = 100 * abs(live.ttft_attainment - simulated.ttft_attainment)
    tpot_points = 100 * abs(live.tpot_attainment - simulated.tpot_attainment)
    p50 = abs(simulated.ttft_p50_s / live.ttft_p50_s - 1)
    inside = 0.60 <= live.ttft_attainment <= 0.95
    return [
        _row("load: live TTFT attainment", live.ttft_attainment, None, "", "0.60 to 0.95", inside),
        _row(
            "TTFT attainment, points apart",
            live.ttft_attainment,
            simulated.ttft_attainment,
            "",
            "5",
            points <= 5,
        ),
        _row(
            "TPOT attainment, points apart",
            live.tpot_attainment,
            simulated.tpot_attainment,
            "",
            "5",
            tpot_points <= 5,
        ),
        _row("TTFT p50", live.ttft_p50_s, simulated.ttft_p50_s, "s", "within 20 %", p50 <= 0.20),
        _row("TTFT p99", live.ttft_p99_s, simulated.ttft_p99_s, "s", "", None),
    ]


def _row(
    what: str, live: float, simulated: float | None, unit: str, target: str, met: bool | None
) -> dict[str, Any]:
    return {"what": what, "live": live, "simulated": simulated, "unit": unit, "target": target, "met": met}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not (MODEL_PATH / "config.json").exists():
        sys.exit("validate: no SmolLM2; run make model")
    began, load_before = time.monotonic(), os.getloadavg()
    with live_system() as system:
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        others = OtherWork(system)
        found = calibrate(system)
        others_then = others.share()
        print(f"calibrated: {found}", flush=True)
        rate, slo = choose_load(found)
        arrivals = validation_trace(rate)
        predicted = simulate(simulated_fleet(found, slo), arrivals)
        print(f"{len(arrivals)} requests, {rate:.2f} a second, {slo}; live now", flush=True)
        others = OtherWork(system)
        played = play(system.url, arrivals, seed=9, slo=slo)
        others_now = others.share()
    slos = dict.fromkeys(MODELS, slo)
    live, simulated = summarise(played.replayed, slos), summarise(predicted, slos)
    result = {
        "name": "validation",
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.sim.validate {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average": {"before": load_before[0], "after": os.getloadavg()[0]},
        "cpu_of_other_processes": {"calibration": others_then, "trace": others_now},
        "seconds": round(time.monotonic() - began, 1),
        "slo": asdict(slo),
        "requests_per_s": rate,
        "rows": rows(live, simulated),
        "live": _known(live),
        "simulated": _known(simulated),
        "placement": {"live": played.replayed.placement, "simulated": predicted.placement},
        "calibration": asdict(found),
        "sent_late_p99_s": played.sent_late_p99_s,
        "by_model": _by_model(played.replayed.outcomes, predicted.outcomes),
    }
    for row in result["rows"]:
        print(row, flush=True)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return 0 if all(row["met"] is not False for row in result["rows"]) else 1


def _known(summary: Summary) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else value for key, value in asdict(summary).items()}


def _by_model(live: Sequence[Outcome], simulated: Sequence[Outcome]) -> dict[str, Any]:
    """Medians of each model: requests, TTFT and TPOT, live then simulated."""
    table = {}
    for name in MODELS:
        both = [[o for o in side if o.model == name and o.ended_at is not None] for side in (live, simulated)]
        table[name] = {
            "requests": len(both[0]),
            "ttft_p50_s": [statistics.median(map(ttft_s, side)) for side in both if side],
            "tpot_p50_s": [statistics.median(map(tpot_s, side)) for side in both if side],
        }
    return table


if __name__ == "__main__":
    sys.exit(main())
