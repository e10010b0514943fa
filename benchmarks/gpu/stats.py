"""Percentiles, and the interval of a ratio from interleaved pairs."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Ours over the peer's: geometric mean over the pairs, and its 95 % interval."""

    value: float
    low: float
    high: float

    def within(self, share: float, *, bigger_is_better: bool) -> bool:
        """Even the worse end of the interval costs no more than ``share``."""
        if bigger_is_better:
            return self.low >= 1.0 - share
        return self.high <= 1.0 + share


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; ``share`` from 0 to 1."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio_of_pairs(ours: Sequence[float], peers: Sequence[float], *, seed: int = 1) -> Ratio:
    """Bootstrap over pairs: the two of a pair were measured one after the other, so they share the card's mood."""
    if len(ours) != len(peers) or not ours:
        raise ValueError(f"{len(ours)} and {len(peers)} measurements are no pairs")
    logs = [math.log(mine / other) for mine, other in zip(ours, peers, strict=True)]
    dice = random.Random(seed)
    means = sorted(statistics.fmean(dice.choices(logs, k=len(logs))) for _ in range(_RESAMPLES))
    return Ratio(
        value=math.exp(statistics.fmean(logs)),
        low=math.exp(percentile(means, 0.025)),
        high=math.exp(percentile(means, 0.975)),
    )
