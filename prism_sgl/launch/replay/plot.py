"""Curves of a replay as a picture. matplotlib is not among our dependencies: it is used where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_sgl.errors import PrismError
from prism_sgl.launch.replay.runs import Run


class PlotError(PrismError):
    """There is nothing to draw with."""


def drawer() -> Any:
    """Asked before hours of replays, not after them."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise PlotError(
            "--plot needs matplotlib, which is not installed; run: pip install matplotlib"
        ) from None


def attainment(runs: Sequence[Run], path: Path, pyplot: Any) -> None:
    """TTFT attainment over the rate scale, one panel for each number of devices and SLO scale."""
    panels = sorted({(run.gpus, run.slo_scale) for run in runs})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (gpus, slo_scale) in zip(axes[0], panels, strict=True):
        for policy in dict.fromkeys(run.policy for run in runs):
            points = sorted(
                (run.rate_scale, run.summary.ttft_attainment)
                for run in runs
                if (run.policy, run.gpus, run.slo_scale) == (policy, gpus, slo_scale)
            )
            if points:
                axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=policy)
        axis.set_title(f"{gpus} devices, SLO scale {slo_scale:g}")
        axis.set_xlabel("rate scale")
        axis.axhline(0.99, color="grey", linewidth=0.5)
    axes[0][0].set_ylabel("TTFT attainment")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def gpus_needed(needed: dict[str, int | None], path: Path, pyplot: Any) -> None:
    """One bar a policy; none where the most that was tried is not enough."""
    figure, axis = pyplot.subplots(figsize=(5, 4))
    known = {policy: count for policy, count in needed.items() if count is not None}
    axis.bar(list(known), list(known.values()))
    axis.set_ylabel("devices needed")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
