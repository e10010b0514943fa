"""Percentiles, and the interval of a ratio from interleaved rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

_RESAMPLES = 4000

Samples = npt.NDArray[np.float64]
Statistic = Callable[[Samples], Any]  # over the last axis

mean: Statistic = partial(np.mean, axis=-1)


def quantile(share: float) -> Statistic:
    return partial(np.quantile, q=share, axis=-1)


@dataclass(frozen=True)
class Ratio:
    """Ours over the peer's, and its 95 % interval."""

    value: float
    low: float
    high: float

    def within(self, share: float, *, bigger_is_better: bool) -> bool:
        """Even the worse end of the interval costs no more than ``share``."""
        if bigger_is_better:
            return self.low >= 1.0 - share
        return self.high <= 1.0 + share

    def inverse(self) -> Ratio:
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; ``share`` from 0 to 1."""
    if not values:
        raise ValueError("no values")
    return float(quantile(share)(np.asarray(values)))


def ratio_of_requests(
    ours: Sequence[float], peers: Sequence[float], statistic: Statistic, *, paired: bool
) -> Ratio:
    """``statistic`` of our requests over that of the peer's, one run of each.

    Bootstrap over requests: in pairs where sample n of both is the same request, else each side by itself. Requests of
    one run wait for each other, so this says how far single requests decide, and not what another day would bring.
    """
    if paired:
        return ratio_of_rounds([[value] for value in ours], [[value] for value in peers], statistic)
    dice = np.random.default_rng(1)
    sides = [np.asarray(side, dtype=np.float64) for side in (ours, peers)]
    drawn = [statistic(side[dice.integers(len(side), size=(_RESAMPLES, len(side)))]) for side in sides]
    ratios = drawn[0] / drawn[1]
    return Ratio(
        value=float(statistic(sides[0]) / statistic(sides[1])),
        low=float(np.quantile(ratios, 0.025)),
        high=float(np.quantile(ratios, 0.975)),
    )


def ratio_of_rounds(
    ours: npt.ArrayLike, peers: npt.ArrayLike, statistic: Statistic, *, seed: int = 1
) -> Ratio:
    """``statistic`` of all our samples over that of all the peer's. Each ``[rounds, samples of a round]``.

    Bootstrap over rounds, not over samples: those of one round were measured one after the other, so they share the
    card's mood, and requests of one burst wait for each other.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (ours, peers)]
    rounds = {len(side) for side in sides}
    if len(rounds) > 1 or 0 in rounds:
        raise ValueError(f"{rounds} rounds of measurements cannot be compared")
    num_rounds = rounds.pop()
    chosen = np.random.default_rng(seed).integers(num_rounds, size=(_RESAMPLES, num_rounds))
    # A part at a time: all at once would be gigabytes.
    ratios = [
        mine / theirs
        for part in np.array_split(chosen, 40)
        for mine, theirs in zip(
            *(statistic(side[part].reshape(len(part), -1)) for side in sides), strict=True
        )
    ]
    return Ratio(
        value=float(statistic(sides[0].ravel()) / statistic(sides[1].ravel())),
        low=float(np.quantile(ratios, 0.025)),
        high=float(np.quantile(ratios, 0.975)),
    )
