"""Runs policies over rate scales, SLO scales and numbers of devices, with repeats; and the search of ``plan``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from prism_sgl.launch.replay import trace_file
from prism_sgl.launch.replay.fleet_file import FleetFile
from prism_sgl.launch.replay.trace_file import Trace
from prism_sgl.schedulers.replay import policies
from prism_sgl.schedulers.replay.outcomes import Summary, percentile, summarise, tpot_s, ttft_s
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, Replayed, Slo

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Run:
    """One point. Means over repeats, each repeat with arrivals moved by up to half a second."""

    policy: str
    rate_scale: float
    slo_scale: float
    gpus: int
    summary: Summary
    ttft_interval: tuple[float, float]  # of the attainment: smallest and largest of the repeats
    tpot_interval: tuple[float, float]
    tuning: str
    log: str  # digest of the first repeat: the same inputs give the same
    placement: dict[str, list[str]]

    @classmethod
    def of(
        cls,
        policy: str,
        point: tuple[float, float, int],
        summaries: Sequence[Summary],
        *,
        tuning: str,
        log: str,
        placement: dict[str, list[str]],
    ) -> Run:
        """``point``: rate scale, SLO scale, devices; a summary for each repeat."""
        ttfts, tpots = [s.ttft_attainment for s in summaries], [s.tpot_attainment for s in summaries]
        return cls(
            policy,
            *point,
            summary=_mean(summaries),
            ttft_interval=(min(ttfts), max(ttfts)),
            tpot_interval=(min(tpots), max(tpots)),
            tuning=tuning,
            log=log,
            placement=placement,
        )

    def as_json(self) -> dict[str, Any]:
        numbers = {key: _rounded(value) for key, value in asdict(self.summary).items()}
        return {
            "policy": self.policy,
            "rate_scale": self.rate_scale,
            "slo_scale": self.slo_scale,
            "gpus": self.gpus,
            **numbers,
            "ttft_attainment_interval": [_rounded(x) for x in self.ttft_interval],
            "tpot_attainment_interval": [_rounded(x) for x in self.tpot_interval],
            "tuning": self.tuning,
            "log": self.log[:16],
            "placement": self.placement,
        }


class Runner:
    """Owner of one fleet and one trace. SLO bases are measured once: P95 of each model on devices of its own."""

    def __init__(self, file: FleetFile, trace: Trace, *, repeats: int = 1, tries: int = 4) -> None:
        self._file, self._trace = file, trace
        self._repeats, self._tries = repeats, tries
        self._bases = {spec.name: self._base(spec.name) for spec in file.fleet.models}

    @property
    def bases(self) -> dict[str, Slo]:
        return dict(self._bases)

    def _base(self, model: str) -> Slo:
        """At rate scale 1, as the paper has it (section 7.1)."""
        arrivals = trace_file.arrivals(self._trace, self._file.fleet, 1.0)
        answered = policies.alone(self._file.fleet, model, arrivals).outcomes
        return Slo(
            percentile(sorted(map(ttft_s, answered)), 95), percentile(sorted(map(tpot_s, answered)), 95)
        )

    def fleet(self, slo_scale: float, gpus: int) -> Fleet:
        """With the SLOs of this scale; a model's own SLO in the fleet file stays as it is."""
        models = tuple(
            spec
            if spec.name in self._file.own_slos
            else replace(
                spec,
                slo=Slo(self._bases[spec.name].ttft_s * slo_scale, self._bases[spec.name].tpot_s * slo_scale),
            )
            for spec in self._file.fleet.models
        )
        return replace(self._file.fleet, models=models, num_devices=gpus)

    def arrivals(self, rate_scale: float, seed: int = 0) -> list[Arrival]:
        return trace_file.arrivals(self._trace, self._file.fleet, rate_scale, seed)

    def num_requests(self, policy: str, rate_scale: float) -> int:
        """What a progress bar counts: every try of a tuning and every repeat."""
        tries = {"static": self._tries, "muxserve": self._tries, "paper": min(4, self._tries), "qlm": 3}
        return len(self.arrivals(rate_scale)) * (tries.get(policy, 1) + self._repeats - 1)

    def run(
        self,
        policy: str,
        rate_scale: float,
        slo_scale: float,
        gpus: int,
        progress: Progress = lambda done: None,
    ) -> Run:
        fleet = self.fleet(slo_scale, gpus)
        slos = {spec.name: spec.slo for spec in fleet.models}
        arrivals = self.arrivals(rate_scale)
        best: tuple[Summary, Replayed, policies.Tuning] | None = None
        for tuning in policies.tunings(policy, fleet, arrivals, tries=self._tries):
            replayed = tuning.replay(arrivals, progress)
            summary = summarise(replayed, slos)
            if best is None or summary.ttft_attainment > best[0].ttft_attainment:
                best = (summary, replayed, tuning)
        assert best is not None
        summaries = [best[0]]
        for seed in range(1, self._repeats):
            again = best[2].replay(self.arrivals(rate_scale, seed), progress)
            summaries.append(summarise(again, slos))
        return Run.of(
            policy,
            (rate_scale, slo_scale, gpus),
            summaries,
            tuning=best[2].text,
            log=best[1].log,
            placement=best[1].placement,
        )

    # ------------------------------------------------------------ searches

    def most_rate(
        self,
        policy: str,
        slo_scale: float,
        gpus: int,
        target: float,
        *,
        most: float = 64.0,
        step: float = 0.25,
    ) -> tuple[float, Run | None]:
        """The largest rate scale at which the target is met, up to ``most``: doubling, then halving."""
        low, high, found = 0.0, step, None
        while high <= most:
            run = self.run(policy, high, slo_scale, gpus)
            if run.summary.ttft_attainment < target:
                break
            low, high, found = high, high * 2, run
        high = min(high, most)
        while high - low > step:
            middle = round((low + high) / 2 / step) * step
            if middle in (low, high):
                break
            run = self.run(policy, middle, slo_scale, gpus)
            if run.summary.ttft_attainment >= target:
                low, found = middle, run
            else:
                high = middle
        return low, found

    def fewest_gpus(
        self, policy: str, rate_scale: float, slo_scale: float, target: float, most: int
    ) -> tuple[int | None, Run]:
        """The fewest devices that are enough, and their run; None and the run of ``most`` if none are.

        Every number is tried, upward from the widest model: attainment is not monotonic in devices (a placement that
        is blind to the load may be worse with one more), so a larger number may fail again.
        """
        least = max(spec.tp for spec in self._file.fleet.models)
        for gpus in range(min(least, most), most + 1):
            run = self.run(policy, rate_scale, slo_scale, gpus)
            if run.summary.ttft_attainment >= target:
                return gpus, run
        return None, run


def _mean(summaries: Sequence[Summary]) -> Summary:
    if len(summaries) == 1:
        return summaries[0]
    means = {key: _mean_of([asdict(s)[key] for s in summaries]) for key in asdict(summaries[0])}
    counts = {key: round(means[key]) for key in ("requests", "failed", "migrations", "wakes", "moved")}
    return Summary(**{**means, **counts})  # type: ignore[arg-type]  # by field name


def _mean_of(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def _rounded(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return None if math.isnan(value) else float(f"{value:.6g}")
