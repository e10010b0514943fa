"""From what clients saw to the numbers of a run. A request that failed is a missed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism_sgl.schedulers.replay.spec import Move, Outcome, Replayed, Slo


@dataclass(frozen=True)
class Summary:
    """Of one run. Times are the clients'; NaN where nothing was answered."""

    requests: int
    failed: int
    ttft_attainment: float
    tpot_attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    migrations: int
    wakes: int
    gpu_busy: float
    moved: int  # requests that waited while their model was on its way to another device
    ttft_p99_moved_s: float  # of those
    ttft_p99_unmoved_s: float  # of all others


def ttft_s(outcome: Outcome) -> float:
    return math.inf if outcome.first_at is None else outcome.first_at - outcome.arrived_at


def tpot_s(outcome: Outcome) -> float:
    """Seconds a token after the first; 0 for an answer of one token."""
    if outcome.first_at is None or outcome.ended_at is None:
        return math.inf
    return (outcome.ended_at - outcome.first_at) / max(1, outcome.output_tokens - 1)


def is_failed(outcome: Outcome) -> bool:
    return bool(outcome.failure) or outcome.ended_at is None


def summarise(replayed: Replayed, slos: Mapping[str, Slo]) -> Summary:
    outcomes = replayed.outcomes
    good = [o for o in outcomes if not is_failed(o)]
    ttfts = sorted(ttft_s(o) for o in good)
    caught = caught_in_moves(outcomes, replayed.moves)
    apart = {moved: sorted(ttft_s(o) for o in good if (id(o) in caught) is moved) for moved in (True, False)}
    return Summary(
        requests=len(outcomes),
        failed=len(outcomes) - len(good),
        ttft_attainment=_share(good, len(outcomes), lambda o: ttft_s(o) <= slos[o.model].ttft_s),
        tpot_attainment=_share(good, len(outcomes), lambda o: tpot_s(o) <= slos[o.model].tpot_s),
        ttft_p50_s=percentile(ttfts, 50),
        ttft_p99_s=percentile(ttfts, 99),
        migrations=replayed.migrations,
        wakes=replayed.wakes,
        gpu_busy=replayed.gpu_busy,
        moved=len(caught),
        ttft_p99_moved_s=percentile(apart[True], 99),
        ttft_p99_unmoved_s=percentile(apart[False], 99),
    )


def caught_in_moves(outcomes: Sequence[Outcome], moves: Sequence[Move]) -> set[int]:
    """``id`` of each request that waited for its first token at some time of a move of its model."""
    of_model: dict[str, list[Move]] = {}
    for move in moves:
        of_model.setdefault(move.model, []).append(move)
    return {
        id(outcome)
        for outcome in outcomes
        for move in of_model.get(outcome.model, ())
        if outcome.arrived_at <= move.ended_at
        and (outcome.first_at is None or outcome.first_at >= move.began_at)
    }


def _share(good: Sequence[Outcome], total: int, met: Callable[[Outcome], bool]) -> float:
    return sum(map(met, good)) / total if total else 1.0


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(len(ordered) * percent / 100) - 1))]
