"""Engines over several devices (tp > 1) beside a Controller that does not know them yet.

Live, tp > 1 is refused. In a replay of policy ``prism`` such a model stands where it stands from the begin to the
end, like one that is pinned: equal parts on the least filled devices, no two parts on one (Prism A.2.2), first come
first served. What the parts hold is taken off the budgets that the Controller is told.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Clock, Device
from prism_sgl.schedulers.replay.engine import Engine
from prism_sgl.schedulers.replay.spec import Arrival, ModelSpec, Outcome


def place(models: Sequence[ModelSpec], num_devices: int, device_bytes: int) -> dict[str, tuple[int, ...]]:
    """Largest parts first, each to the devices that hold least. One that fits nowhere is left out."""
    used = [0] * num_devices
    placed: dict[str, tuple[int, ...]] = {}
    for spec in sorted(models, key=lambda m: (-m.costs.awake_bytes, m.name)):
        need = spec.costs.awake_bytes
        room = [i for i in range(num_devices) if used[i] + need <= device_bytes]
        if len(room) >= spec.tp:
            placed[spec.name] = tuple(sorted(room, key=lambda i: (used[i], i))[: spec.tp])
            for i in placed[spec.name]:
                used[i] += need
    return placed


class Spanning:
    """Owner of these engines and of what became of their requests."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self.num_open = 0

    def add(self, spec: ModelSpec, devices: Sequence[Device]) -> None:
        engine = Engine(spec.name, spec.costs, devices, self._clock)
        for device in devices:
            held = device.try_hold(engine, engine.open_bytes)
            assert held, "parts are placed before anything else"
        engine.open()
        self._engines[spec.name] = engine

    def request(self, arrival: Arrival, spec: ModelSpec) -> Outcome:
        now = self._clock.now
        outcome = Outcome(arrival.model, now, arrival.prompt_tokens, arrival.output_tokens)
        engine = self._engines.get(arrival.model)
        if engine is None:
            outcome.failure = "no devices have room for its model"
            return outcome

        def first() -> None:
            outcome.first_at = self._clock.now

        def end() -> None:
            outcome.ended_at = self._clock.now
            self.num_open -= 1

        self.num_open += 1
        job = Job(arrival.model, arrival.prompt_tokens, arrival.output_tokens, first, end)
        self._clock.after(spec.costs.latency_s, lambda: engine.submit(job))
        return outcome

    def check(self) -> None:
        for engine in self._engines.values():
            engine.check()
