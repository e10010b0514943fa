"""The runs of ``prism-sgl replay --live``: the same points and the same numbers as in simulation."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from prism_sgl.launch.replay.client import LiveServer, Prompts
from prism_sgl.launch.replay.live import LiveReplay, replay_live
from prism_sgl.launch.replay.runs import Run, Runner
from prism_sgl.schedulers.replay.outcomes import summarise

POLICY = "live"


@dataclass(frozen=True)
class LiveRun:
    """A run as the simulation has it, and what only a real server can do: fail, and be asked too late."""

    run: Run
    replays: tuple[LiveReplay, ...]

    def as_json(self) -> dict[str, Any]:
        """What the server does not tell is null."""
        known = {
            "migrations": _mean([replay.migrations for replay in self.replays]),
            "wakes": _mean([replay.wakes for replay in self.replays]),
        }
        return {
            **self.run.as_json(),
            **known,
            "failures": self.failures,
            "sent_late_p99_s": self.sent_late_p99_s,
        }

    @property
    def failures(self) -> dict[str, int]:
        """How often each reason, commonest first."""
        reasons = (outcome.failure for replay in self.replays for outcome in replay.replayed.outcomes)
        return dict(Counter(reason for reason in reasons if reason).most_common(20))

    @property
    def sent_late_p99_s(self) -> float:
        return max(replay.sent_late_p99_s for replay in self.replays)


@dataclass(frozen=True)
class Target:
    """A server, how to ask it, and its names of the fleet's models."""

    url: str
    served: Mapping[str, str]
    prompts: Prompts
    key: str | None = None

    def runs(
        self,
        runner: Runner,
        points: Sequence[tuple[float, float, int]],
        repeats: int,
        progress: Callable[[str, int], None],
    ) -> list[LiveRun]:
        """One after the other, each ``repeats`` times. ``progress(point, answers)``. Raises LiveError."""
        return asyncio.run(self._runs(runner, points, repeats, progress))

    async def _runs(
        self,
        runner: Runner,
        points: Sequence[tuple[float, float, int]],
        repeats: int,
        progress: Callable[[str, int], None],
    ) -> list[LiveRun]:
        async with LiveServer(self.url, self.served, self.prompts, key=self.key) as server:
            progress("waiting for a first answer of each model", 0)
            await server.check()
            found = []
            for rate_scale, slo_scale, gpus in points:
                slos = {spec.name: spec.slo for spec in runner.fleet(slo_scale, gpus).models}
                show = f"{POLICY} x{rate_scale:g}"
                replays = [
                    await replay_live(
                        server, runner.arrivals(rate_scale, seed), slos, progress=partial(progress, show)
                    )
                    for seed in range(repeats)
                ]
                run = Run.of(
                    POLICY,
                    (rate_scale, slo_scale, gpus),
                    [summarise(replay.replayed, slos) for replay in replays],
                    tuning="; ".join([self.url, *replays[0].notes]),
                    log="",
                    placement=replays[-1].replayed.placement,
                )
                found.append(LiveRun(run, tuple(replays)))
            return found


def _mean(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return round(sum(known) / len(known)) if known else None
