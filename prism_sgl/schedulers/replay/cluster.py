"""The machine that baselines drive: devices, and engines that they open, close and give requests.

A baseline sees the same physics as the Controller does (``engine.py``, ``device.py``); only its decisions differ.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Device, HeapClock
from prism_sgl.schedulers.replay.engine import Engine
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, ModelSpec, Move, Outcome, Replayed, span_s


class Instance:
    """One engine of one model on its devices, as a baseline handles it. Owner of the engine's state."""

    class State(enum.Enum):
        ASLEEP = "asleep"
        WAKING = "waking"
        AWAKE = "awake"
        CLOSING = "closing"

    def __init__(
        self, spec: ModelSpec, devices: Sequence[Device], clock: HeapClock, kv_cap_bytes: int
    ) -> None:
        self.spec, self.devices = spec, tuple(devices)
        self.engine = Engine(spec.name, spec.costs, devices, clock, kv_cap_bytes=kv_cap_bytes)
        self.state = Instance.State.ASLEEP
        self.idle_since = 0.0
        self.in_flight = 0  # given to it, tokenizer included
        self.unanswered = 0  # of those, without a first token
        self._written = 0

    def wrote(self, tokens: int) -> None:
        self._written += tokens

    def take_written(self) -> int:
        """Tokens of the answers that ended since the last call."""
        written, self._written = self._written, 0
        return written

    @property
    def device(self) -> Device:
        return self.devices[0]

    @property
    def is_awake(self) -> bool:
        return self.state is Instance.State.AWAKE


class Policy(Protocol):
    """Decides. ``begin`` opens what shall be open at the start; nothing else happens without it."""

    @property
    def name(self) -> str: ...
    def begin(self, cluster: Cluster) -> None: ...
    def arrived(self, cluster: Cluster, ticket: Ticket) -> None: ...
    def progressed(self, cluster: Cluster, instance: Instance) -> None:
        """A first token is out, or a request is over."""
        ...


class Ticket:
    """One request on its way. ``deadline`` is the client's."""

    __slots__ = ("deadline", "instance", "number", "outcome", "spec")

    def __init__(self, number: int, spec: ModelSpec, outcome: Outcome) -> None:
        self.number, self.spec, self.outcome = number, spec, outcome
        self.deadline = outcome.arrived_at + spec.slo.ttft_s
        self.instance: Instance | None = None

    @property
    def arrival(self) -> float:
        return self.outcome.arrived_at


class Cluster:
    """Owner of the clock, the devices and all instances."""

    def __init__(self, fleet: Fleet, *, check: bool = False) -> None:
        self.fleet = fleet
        self.specs = fleet.by_name()
        self.clock = HeapClock()
        self.devices = [
            Device(f"gpu{i}", fleet.device_bytes, self.clock, fleet.copy_slowdown)
            for i in range(fleet.num_devices)
        ]
        self.instances: list[Instance] = []
        self.moves: list[Move] = []
        self._sources: dict[Instance, Move] = {}  # of moves that are not over
        self.wakes = 0
        self.open_tickets = 0
        self._check = check
        self._log = hashlib.sha256()
        self._policy: Policy | None = None

    @property
    def now(self) -> float:
        return self.clock.now

    # ------------------------------------------------------------ what a policy does

    def add(self, model: str, devices: Sequence[int], *, kv_cap_bytes: int = 0) -> Instance | None:
        """A sleeping instance there, charged for what a sleeper keeps; None if that does not fit."""
        chosen = [self.devices[i] for i in devices]
        instance = Instance(self.specs[model], chosen, self.clock, kv_cap_bytes)
        if not _hold_all(chosen, instance.engine, instance.spec.costs.asleep_bytes):
            return None
        self.instances.append(instance)
        return instance

    def open_at_once(self, instance: Instance) -> bool:
        """For the begin, when engines have started before the trace does."""
        missing = instance.engine.open_bytes - instance.device.held_by(instance.engine)
        if not _hold_all(instance.devices, instance.engine, missing):
            return False
        self._opened(instance)
        return True

    def wake(self, instance: Instance, then: Callable[[], None], *, seconds: float | None = None) -> None:
        """Hold the memory as soon as it is there, copy, then call."""
        assert instance.state is Instance.State.ASLEEP
        instance.state = Instance.State.WAKING
        self.wakes += 1
        self._note("wake", instance)
        missing = instance.engine.open_bytes - instance.device.held_by(instance.engine)
        waits = len(instance.devices)

        def granted(kept_bytes: int) -> None:
            nonlocal waits
            waits -= 1
            if waits == 0:
                for device in instance.devices:
                    device.copying(1)
                self.clock.after(instance.spec.costs.wake_s if seconds is None else seconds, woke)

        def woke() -> None:
            for device in instance.devices:
                device.copying(-1)
            self._opened(instance)
            then()

        for device in instance.devices:
            device.claim(instance.engine, missing, granted)

    def sleep(self, instance: Instance, then: Callable[[], None] = lambda: None) -> None:
        assert instance.is_awake and not instance.in_flight
        if (move := self._sources.pop(instance, None)) is not None:
            move.ended_at = self.now
        instance.state = Instance.State.CLOSING
        self._note("sleep", instance)

        def slept() -> None:
            instance.state = Instance.State.ASLEEP
            instance.engine.close(instance.spec.costs.asleep_bytes)
            then()

        self.clock.after(instance.spec.costs.sleep_s, slept)

    def moves_from(self, source: Instance) -> None:
        """Its model is on the way to another device, until the source has drained and sleeps."""
        self._sources[source] = Move(source.spec.name, self.now)
        self.moves.append(self._sources[source])

    def remove(self, instance: Instance) -> None:
        """Its engine serves nobody any more and gives all back."""
        assert instance.state is Instance.State.ASLEEP
        instance.engine.abort()
        self.instances.remove(instance)

    def run_on(self, ticket: Ticket, instance: Instance) -> None:
        """Give the request to this engine now."""
        assert instance.is_awake
        outcome = ticket.outcome
        ticket.instance = instance
        instance.in_flight += 1
        instance.unanswered += 1
        self._note(f"run {ticket.number}", instance)

        def first() -> None:
            outcome.first_at = self.now
            instance.unanswered -= 1
            self._progressed(instance)

        def end() -> None:
            outcome.ended_at = self.now
            instance.in_flight -= 1
            instance.wrote(outcome.output_tokens)
            instance.idle_since = self.now
            self.open_tickets -= 1
            self._progressed(instance)

        def submit() -> None:
            instance.engine.submit(job)

        job = Job(ticket.number, outcome.prompt_tokens, outcome.output_tokens, first, end)
        self.clock.after(instance.spec.costs.latency_s, submit)

    def fail(self, ticket: Ticket, why: str) -> None:
        ticket.outcome.failure = why
        self.open_tickets -= 1

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        def tick() -> None:
            action()
            self.clock.after(seconds, tick)

        self.clock.after(seconds, tick)

    # ------------------------------------------------------------ what happens

    def _opened(self, instance: Instance) -> None:
        instance.state = Instance.State.AWAKE
        instance.idle_since = self.now
        instance.engine.open()

    def _progressed(self, instance: Instance) -> None:
        assert self._policy is not None
        self._policy.progressed(self, instance)
        if self._check:
            self.check()

    def _note(self, what: str, instance: Instance) -> None:
        self._log.update(f"{self.now:.9f} {what} {instance.spec.name} {instance.device.name};".encode())

    def replay(
        self,
        policy: Policy,
        arrivals: Iterable[Arrival],
        *,
        drain_s: float = 300.0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Replayed:
        """From the first arrival until ``drain_s`` after the last, or until all is answered."""
        self._policy = policy
        policy.begin(self)
        listed = list(arrivals)
        outcomes: list[Outcome] = []
        for number, arrival in enumerate(listed):
            self.clock.run(arrival.at_s)
            outcome = Outcome(arrival.model, arrival.at_s, arrival.prompt_tokens, arrival.output_tokens)
            outcomes.append(outcome)
            ticket = Ticket(number, self.specs[arrival.model], outcome)
            self.open_tickets += 1
            policy.arrived(self, ticket)
            if self._check:
                self.check()
            progress(1)
        end_s = listed[-1].at_s if listed else 0.0
        busy_s = sum(device.busy_s() for device in self.devices)
        while self.open_tickets and self.now < end_s + drain_s:
            self.clock.run(min(self.now + 5.0, end_s + drain_s))
        for outcome in outcomes:
            if outcome.ended_at is None and not outcome.failure:
                outcome.failure = "not answered in time"
        return Replayed(
            outcomes=outcomes,
            migrations=len(self.moves),
            moves=self.moves,
            wakes=self.wakes,
            gpu_busy=min(1.0, busy_s / (max(span_s(listed), 1e-9) * len(self.devices))),
            log=self._log.hexdigest(),
            placement={
                device.name: [i.spec.name for i in self.instances if i.is_awake and device in i.devices]
                for device in self.devices
            },
        )

    def check(self) -> None:
        for device in self.devices:
            device.check()
        for instance in self.instances:
            instance.engine.check()


def _hold_all(devices: Sequence[Device], owner: object, size_bytes: int) -> bool:
    for done, device in enumerate(devices):
        if not device.try_hold(owner, size_bytes):
            for other in devices[:done]:
                other.release(owner, size_bytes)
            return False
    return True
