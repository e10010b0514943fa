"""A trace with the published statistics of Hyperbolic's: python -m benchmarks.sim.generate

Hyperbolic's own trace (Prism, OSDI 2026, Table 1: 24 models, 4 months) is not public. This one has what the paper says
of it, and of its four traces where it names none (``PUBLISHED``). What it does not say is ours, by name (``OURS``).
Writes benchmarks/sim/data/hyperbolic_like.csv and prints each statistic beside the published one.

Each model lives in sessions (minutes) and is silent between them; a session is a row of bursts (seconds) with gaps.
Bursts of one model differ in intensity, and requests fall on them by it, so that a model's count is what its popularity
says. Sessions of models are independent of each other and of the time, so no past tells what comes.
"""

from __future__ import annotations

import bisect
import csv
import itertools
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_sgl.launch.replay.trace_file import COLUMNS, Row

FILE = Path(__file__).parent / "data" / "hyperbolic_like.csv"
SEED = 20_260_701
SECONDS = 3600.0
REQUESTS = 9_000
# Models are numbered from 1 and have the counts that Arena-Chat's of the same number have (arena_chat.csv), so that a
# fleet of that trace fits this one: the paper publishes no popularity of Hyperbolic's models.
_POPULARITY = (40, 296, 22, 66, 120, 67, 56, 36, 23, 262, 26, 43, 44, 22, 46, 25, 3, 12, 19, 31, 2, 19, 11, 2)
_ACTIVE_S = 120.0  # "active if it has received at least one request in the past two minutes" (A.1)
_IDLE_S = 10.0  # "idle intervals per hour (> 10 s each)" (A.1)


@dataclass(frozen=True)
class Published:
    """What a statistic must lie between, and where that is said."""

    low: float
    high: float
    source: str


PUBLISHED: dict[str, Published] = {
    "models": Published(24, 24, "Table 1, Hyperbolic"),
    "mean share of models that are active": Published(0.23, 0.50, "3.1: 23 % to 50 % over the four traces"),
    "changes of the active set an hour": Published(54, 766, "3.1 and A.1: 54 to 766 over the four traces"),
    "mean share of 10 s in which a model gets nothing": Published(0.70, 1.0, "3.1: idle over 70 % (Novita)"),
    "share of models with 40 to 100 idle intervals an hour": Published(
        0.33, 1.0, "3.2 and A.1: many models of Hyperbolic and Novita; we take many for a third"
    ),
    "share of models whose CV of requests a minute is over 1": Published(
        0.5, 1.0, "A.1: many models of Hyperbolic and Novita; we take many for half"
    ),
    "mean correlation of a model's rate with its rate half the trace later": Published(
        -0.15, 0.15, "A.1: near zero from day to day"
    ),
}
OURS: dict[str, str] = {
    "length and rate": "one hour, 2.5 requests/s: the rate of Arena-Chat as prism-research ships it",
    "popularity": "Arena-Chat's counts by number; the first 1, 3, 5 and 10 models get 23, 52, 63 and 80 %",
    "prompt tokens": "log-normal, median 150, sigma 1.2, 4 to 3,000: heavier than Arena-Chat's (7.2: 'more bursty and "
    "heavier'; no numbers)",
    "output tokens": "log-normal, median 180, sigma 0.8, 8 to 1,000, mean near Arena-Chat's 256",
}


@dataclass(frozen=True)
class _Burst:
    begin_s: float
    end_s: float
    weight: float  # of its share of the model's requests


def generate(seed: int = SEED) -> list[Row]:
    """In the order of time; the same seed gives the same rows."""
    noise = random.Random(seed)
    rows = []
    for number, popularity in enumerate(_POPULARITY, start=1):
        count = round(REQUESTS * popularity / sum(_POPULARITY))
        bursts = _bursts(noise, popularity)
        sums = list(itertools.accumulate(burst.weight for burst in bursts))
        for _ in range(count):
            burst = bursts[bisect.bisect(sums, noise.random() * sums[-1])]
            at_s = round(noise.uniform(burst.begin_s, burst.end_s), 4)
            rows.append(
                Row(at_s, number, _tokens(noise, 150, 1.2, 4, 3000), _tokens(noise, 180, 0.8, 8, 1000))
            )
    return sorted(rows, key=lambda row: (row.at_s, row.model))


def _bursts(noise: random.Random, popularity: int) -> list[_Burst]:
    """The popular ones are seldom silent, the others live now and then ("some persistently active", 3.1)."""
    alive = min(0.95, 0.15 + popularity / 250)
    session_s = 420.0
    found: list[_Burst] = []
    silence_s = session_s * (1 - alive) / alive
    at_s = -noise.uniform(0.0, session_s + silence_s)
    while at_s < SECONDS:
        end_s = at_s + noise.lognormvariate(math.log(session_s) - 0.32, 0.8)
        while at_s < end_s:
            long_s = noise.lognormvariate(math.log(5.0) - 0.32, 0.8)
            if at_s >= 0.0 and at_s + long_s <= SECONDS:
                found.append(_Burst(at_s, at_s + long_s, long_s * noise.expovariate(1.0)))
            at_s += long_s + 8.0 + noise.expovariate(1 / 10.0)
        at_s = end_s + noise.expovariate(1 / silence_s)
    return found or _bursts(noise, popularity)


def _tokens(noise: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    return min(high, max(low, round(noise.lognormvariate(math.log(median), sigma))))


# ------------------------------------------------------------ statistics


def measure(rows: Sequence[Row], seconds: float = SECONDS) -> dict[str, float]:
    """Each statistic of ``PUBLISHED``, of any trace."""
    times: dict[int, list[float]] = {}
    for row in rows:
        times.setdefault(row.model, []).append(row.at_s)
    hours = seconds / 3600
    idle_intervals = [_long_gaps(listed, seconds) / hours for listed in times.values()]
    minutes = [_bins(listed, seconds, 60.0) for listed in times.values()]
    values = (
        float(len(times)),
        _mean_active(times.values(), seconds),
        _active_changes(times.values(), seconds) / hours,
        statistics.fmean(
            _bins(listed, seconds, _IDLE_S).count(0) * _IDLE_S / seconds for listed in times.values()
        ),
        _share(idle_intervals, lambda n: 40 <= n <= 100),
        _share([statistics.pstdev(m) / statistics.fmean(m) for m in minutes], lambda cv: cv > 1),
        statistics.fmean(_correlation(m[: len(m) // 2], m[len(m) // 2 :]) for m in minutes),
    )
    return dict(zip(PUBLISHED, values, strict=True))


def _share(values: Sequence[float], true: Callable[[float], bool]) -> float:
    return sum(map(true, values)) / len(values)


def _bins(times: Sequence[float], seconds: float, width_s: float) -> list[int]:
    counts = [0] * math.ceil(seconds / width_s)
    for at_s in times:
        counts[min(len(counts) - 1, int(at_s / width_s))] += 1
    return counts


def _long_gaps(times: Sequence[float], seconds: float) -> int:
    ends = [0.0, *times, seconds]
    return sum(later - earlier > _IDLE_S for earlier, later in itertools.pairwise(ends))


def _active_spans(times: Sequence[float], seconds: float) -> list[tuple[float, float]]:
    """When at least one request has come in the past two minutes."""
    spans: list[tuple[float, float]] = []
    for at_s in times:
        until_s = min(seconds, at_s + _ACTIVE_S)
        if spans and at_s <= spans[-1][1]:
            spans[-1] = (spans[-1][0], until_s)
        else:
            spans.append((at_s, until_s))
    return spans


def _mean_active(models: Sequence[Sequence[float]], seconds: float) -> float:
    active_s = sum(end - begin for times in models for begin, end in _active_spans(times, seconds))
    return active_s / seconds / len(models)


def _active_changes(models: Sequence[Sequence[float]], seconds: float) -> int:
    spans = [span for times in models for span in _active_spans(times, seconds)]
    return sum(1 + (end < seconds) for _, end in spans)


def _correlation(left: Sequence[int], right: Sequence[int]) -> float:
    if len(set(left)) < 2 or len(set(right)) < 2:
        return 0.0
    return statistics.correlation(left, right)


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((row.at_s, row.model, row.prompt_tokens, row.output_tokens) for row in rows)


def main() -> int:
    rows = generate()
    write(FILE, rows)
    outside = 0
    print(f"{FILE}: {len(rows)} requests of {SECONDS:.0f} s, seed {SEED}")
    for what, value in measure(rows).items():
        published = PUBLISHED[what]
        inside = published.low <= value <= published.high
        outside += not inside
        verdict = "" if inside else "  OUTSIDE"
        print(f"  {what}: {value:.3g} ({published.low:g} to {published.high:g}; {published.source}){verdict}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
