"""Replays arrivals against a running server: each is sent at its time, whatever has become of those before."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_sgl.launch.replay.client import LiveServer
from prism_sgl.schedulers.replay.outcomes import percentile
from prism_sgl.schedulers.replay.spec import Arrival, Move, Outcome, Replayed, Slo

_LOOK_S = 0.5
# Requests are made so long before they are sent, so that making one never delays it.
_AHEAD_S = 0.05


@dataclass(frozen=True)
class LiveReplay:
    """None: this server does not tell."""

    replayed: Replayed
    migrations: int | None
    wakes: int | None
    sent_late_p99_s: float  # by this client, of the trace's time: what its numbers cannot be trusted below
    notes: list[str]


@dataclass
class _Moves:
    """What a prism_sgl server tells of its models while the trace runs: a device that changed is a move.

    Its begin and its drain are not seen, only that it switched since the last look.
    """

    began: float
    found: list[Move] = field(default_factory=list)
    devices: dict[str, Any] = field(default_factory=dict)

    def look(self, models: Mapping[str, Mapping[str, Any]], now: float) -> None:
        for model, known in models.items():
            device, before = known.get("device"), self.devices.get(model)
            if device and before and device != before:
                self.found.append(Move(model, now - self.began - _LOOK_S, now - self.began))
            self.devices[model] = device or before


async def replay_live(
    server: LiveServer,
    arrivals: Sequence[Arrival],
    slos: Mapping[str, Slo],
    *,
    drain_s: float = 300.0,
    progress: Callable[[int], None] = lambda done: None,
) -> LiveReplay:
    """From the first arrival until ``drain_s`` after the last one, or until all is answered.

    ``server.check()`` comes first: a replay begins when all models have answered once. ``progress`` counts answers.
    """
    loop = asyncio.get_running_loop()
    before = await server.models()
    outcomes: list[Outcome] = []
    late_s: list[float] = []
    tasks: set[asyncio.Task[None]] = set()
    began = loop.time() + _AHEAD_S
    moves = _Moves(began)
    watching = None if before is None else asyncio.create_task(_watch(server, moves))
    for number, arrival in enumerate(arrivals):
        await asyncio.sleep(began + arrival.at_s - _AHEAD_S - loop.time())
        request = server.request(arrival, number=number, slo=slos.get(arrival.model))
        await asyncio.sleep(began + arrival.at_s - loop.time())
        late_s.append(max(0.0, loop.time() - began - arrival.at_s))
        outcome = Outcome(arrival.model, arrival.at_s, arrival.prompt_tokens, arrival.output_tokens)
        outcomes.append(outcome)
        tasks.add(task := asyncio.create_task(server.ask(request, outcome, began)))
        task.add_done_callback(lambda done: progress(1))
    pending = (await asyncio.wait(tasks, timeout=drain_s))[1] if tasks else set()
    for task in pending:
        task.cancel()
    if watching is not None:
        watching.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in tasks - pending:
        task.result()
    for outcome in outcomes:
        if outcome.ended_at is None and not outcome.failure:
            outcome.failure = "not answered in time"
    after = await server.models() if before is not None else None
    migrations, wakes = None, None
    if before is not None and after is not None:
        wakes = _total(after, "wakes") - _total(before, "wakes")
        # One there and back between two looks is told, not seen.
        migrations = max(len(moves.found), _total(after, "moves") - _total(before, "moves"))
    placement: dict[str, list[str]] = {}
    for model, told in (after or {}).items():
        if told.get("device") and told.get("state") == "awake":
            placement.setdefault(str(told["device"]), []).append(model)
    return LiveReplay(
        replayed=Replayed(
            outcomes, migrations or 0, wakes or 0, math.nan, placement=placement, moves=moves.found
        ),
        migrations=migrations,
        wakes=wakes,
        sent_late_p99_s=percentile(sorted(late_s), 99),
        notes=server.inexact(),
    )


async def _watch(server: LiveServer, moves: _Moves) -> None:
    while True:
        if (models := await server.models()) is not None:
            moves.look(models, asyncio.get_running_loop().time())
        await asyncio.sleep(_LOOK_S)


def _total(models: Mapping[str, Mapping[str, Any]], key: str) -> int:
    return sum(int(known.get(key, 0)) for known in models.values())
