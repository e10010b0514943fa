"""Costs of a small model on the CPU, from a run that is not the validated trace: for benchmarks/sim/validate.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.sim.cpu_system import DEVICES, MODELS, play
from prism_sgl.schedulers.replay.outcomes import tpot_s, ttft_s
from prism_sgl.schedulers.replay.spec import Arrival, Outcome
from tests.engine.system import System


@dataclass(frozen=True)
class Calibration:
    """Seconds; what the fit leaves over, as a share, median over its samples."""

    latency_s: float  # a round trip through api_server and runtime that needs no pass
    pass_s: float
    prefill_s_per_token: float
    step_s: float
    step_s_per_request: float
    step_s_per_token: float
    wake_s: float
    sleep_s: float
    shared_ratio: (
        float  # TPOT of a model beside a busy neighbour of its device, to that alone; simulated as 2
    )
    ttft_left: float
    tpot_left: float


_PROMPTS = (8, 64, 128, 200, 320)
_BATCHES = (1, 2, 4)
_WRITTEN = 32


def calibration_trace(model: str, begin_s: float) -> tuple[list[Arrival], float]:
    """Prompts of each length alone, then batches that write together; and when it is over."""
    found, at_s = [], begin_s
    for _ in range(3):
        for tokens in _PROMPTS:
            found.append(Arrival(at_s, model, tokens, 2))
            at_s += 1.0
    for _ in range(2):
        for batch in _BATCHES:
            for tokens in (8, 200):
                found += [Arrival(at_s, model, tokens, _WRITTEN)] * batch
                at_s += 3.5
    return found, at_s


def calibrate(system: System) -> Calibration:
    first, second = (
        next(n for n in MODELS if system.status(n)["device"] == f"gpu{i}") for i in range(DEVICES)
    )
    neighbour = next(n for n in MODELS if n != first and system.status(n)["device"] == "gpu0")
    arrivals, at_s = calibration_trace(first, 1.0)
    more, at_s = calibration_trace(second, at_s)
    together = [Arrival(at_s, name, 8, _WRITTEN) for name in (first, neighbour)]
    warm_up = [Arrival(0.0, name, 64, 8) for name in MODELS]
    play(system.url, warm_up, seed=7)
    replayed = play(system.url, arrivals + more + together, seed=8).replayed
    outcomes, both = replayed.outcomes[: -len(together)], replayed.outcomes[-len(together) :]
    assert not any(outcome.failure for outcome in replayed.outcomes), [o.failure for o in replayed.outcomes]
    short = medians(((1.0, float(o.prompt_tokens)), ttft_s(o)) for o in outcomes if o.output_tokens == 2)
    intercept, per_token = prefill = fit(short)
    written = [o for o in outcomes if o.output_tokens == _WRITTEN]
    batches = medians((_batch_features(o, written), tpot_s(o)) for o in written)
    step = fit(batches)
    alone_s = min(batches.values())
    wakes, sleeps = _sleep_and_wake(system, first)
    latency_s = min(intercept, _round_trip_s(system, first))
    return Calibration(
        latency_s=latency_s,
        pass_s=intercept - latency_s,
        prefill_s_per_token=per_token,
        step_s=step[0],
        step_s_per_request=step[1],
        step_s_per_token=step[2],
        wake_s=statistics.median(wakes),
        sleep_s=statistics.median(sleeps),
        shared_ratio=statistics.fmean(map(tpot_s, both)) / alone_s,
        ttft_left=_left(short, prefill),
        tpot_left=_left(batches, step),
    )


Features = tuple[float, ...]


def _batch_features(outcome: Outcome, others: Sequence[Outcome]) -> Features:
    """1, requests that write at its time, and tokens that are live in the middle of their answers."""
    batch = [o for o in others if o.model == outcome.model and abs(o.arrived_at - outcome.arrived_at) < 0.5]
    live = sum(o.prompt_tokens + o.output_tokens / 2 for o in batch)
    return 1.0, float(len(batch)), live


def medians(samples: Iterable[tuple[Features, float]]) -> dict[Features, float]:
    """Of the repeats, so that what another process took from one of them does not count."""
    groups: dict[Features, list[float]] = {}
    for features, seconds in samples:
        groups.setdefault(features, []).append(seconds)
    return {features: statistics.median(seconds) for features, seconds in groups.items()}


def fit(samples: Mapping[Features, float]) -> list[float]:
    """Least squares of relative errors; no cost below 0."""
    left = np.asarray(list(samples)) / np.asarray(list(samples.values()))[:, None]
    found = np.linalg.lstsq(left, np.ones(len(left)), rcond=None)[0]
    while (found < 0).any():
        kept = found > 0
        found = np.zeros_like(found)
        found[kept] = np.linalg.lstsq(left[:, kept], np.ones(len(left)), rcond=None)[0]
    return [float(value) for value in found]


def _left(samples: Mapping[Features, float], costs: Sequence[float]) -> float:
    return statistics.median(abs(float(np.dot(costs, f)) / seconds - 1) for f, seconds in samples.items())


def _round_trip_s(system: System, model: str) -> float:
    times_s = []
    for _ in range(40):
        began = time.perf_counter()
        system.client.get(f"/m/{model}/model_info").raise_for_status()
        times_s.append(time.perf_counter() - began)
    return statistics.median(times_s)


def _sleep_and_wake(system: System, model: str) -> tuple[list[float], list[float]]:
    wakes, sleeps = [], []
    for _ in range(3):
        for verb, key, into in (("sleep", "last_sleep_s", sleeps), ("wake", "last_wake_s", wakes)):
            system.admin(verb, model).raise_for_status()
            into.append(float(system.client.get(f"/api/v1/models/{model}").json()[key]))
        time.sleep(2.5)  # [scheduler] min_residence of a model that woke
    return wakes, sleeps
