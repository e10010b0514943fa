"""Engines over several devices (tp > 1) for a Controller whose models have one device each.

Live, tp > 1 is refused. In a replay of policy ``prism`` such a model is ``tp`` models of the Controller, one a part:
each is bound to its device, sleeps and wakes there like any other, and is asked for every request of the whole. The
engine computes while all parts are awake, and begins a request when all parts have been granted it.

Parts stand on groups of ``tp`` devices that begin at multiples of ``tp`` (no two on one device, Prism A.2.2). So two
such models share all their devices or none, the wants of their parts are served in one order everywhere, and none
waits for a part of the other while it keeps that one's device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from prism_sgl.messages import RequestId, RequestKey
from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Clock, Device
from prism_sgl.schedulers.replay.engine import Engine
from prism_sgl.schedulers.replay.spec import Arrival, ModelSpec
from prism_sgl.schedulers.virtual import Client, VirtualApi

_LOOK_S = 1.0


def place(models: Sequence[ModelSpec], num_devices: int, device_bytes: int) -> dict[str, tuple[int, ...]]:
    """The largest first, each to the group of devices with least on it. One that fits nowhere is left out."""
    used = [0] * num_devices
    placed: dict[str, tuple[int, ...]] = {}
    for spec in sorted(models, key=lambda m: (-m.costs.awake_bytes, m.name)):
        groups = [range(i, i + spec.tp) for i in range(0, num_devices - spec.tp + 1, spec.tp)]
        if not groups or spec.costs.awake_bytes > device_bytes:
            continue
        chosen = min(groups, key=lambda group: (max(used[i] for i in group), group.start))
        placed[spec.name] = tuple(chosen)
        for i in chosen:
            used[i] += spec.costs.awake_bytes
    return placed


def part_name(model: str, number: int) -> str:
    return f"{model}#{number}"


class Gang:
    """Owner of one engine and of what its parts have been told.

    Invariant: the engine is open exactly while all parts are awake; each awake part holds ``open_bytes`` of its
    device in the engine's name, more only while the engine has requests.
    """

    def __init__(self, spec: ModelSpec, devices: Sequence[Device], clock: Clock) -> None:
        self.spec, self.devices = spec, tuple(devices)
        self.engine = Engine(spec.name, spec.costs, devices, clock)
        self._awake: set[int] = set()
        self._gathered: dict[object, dict[int, Job]] = {}  # request -> the parts that have been granted it
        self._jobs: dict[object, Job] = {}  # request -> what the engine was given
        self._written: dict[object, int] = {}  # of requests set aside: tokens of the answer so far

    def part(self, number: int) -> Part:
        return Part(self, number)

    def part_awake(self, number: int) -> None:
        self._awake.add(number)
        if len(self._awake) == len(self.devices):
            self.engine.open()

    def part_asleep(self, number: int, keep_bytes: int) -> None:
        if self.engine.is_open:
            self.engine.shut()
        self._awake.discard(number)
        device = self.devices[number]
        device.release(self.engine, device.held_by(self.engine) - keep_bytes)

    def submit(self, number: int, job: Job) -> bool:
        request = _whole(job)
        granted = self._gathered.setdefault(request, {})
        granted[number] = job
        if len(granted) < len(self.devices):
            return False
        parts = list(granted.values())

        def first() -> None:
            for part in parts:
                part.on_first()

        def end() -> None:
            del self._gathered[request], self._jobs[request]
            for part in parts:
                part.on_end()

        written = self._written.pop(request, 0)
        whole = Job(request, job.prompt_tokens, job.output_tokens, first, end, written)
        self._jobs[request] = whole
        return self.engine.submit(whole)

    def set_aside(self, number: int) -> list[Job]:
        """One part sleeps with its requests: no other can go on without it, so all wait for it from now on."""
        for whole in self.engine.set_aside() if self.engine.is_open else ():
            self._written[whole.key] = whole.written
            del self._jobs[whole.key]
        granted = (parts.pop(number, None) for parts in self._gathered.values())
        return [job for job in granted if job is not None]

    def cancel(self, number: int, job: Job) -> None:
        """The whole request ends with its first part that goes."""
        request = _whole(job)
        self._gathered.get(request, {}).pop(number, None)
        self._written.pop(request, None)
        if (whole := self._jobs.pop(request, None)) is not None:
            self.engine.cancel(whole)

    def abort(self, number: int) -> None:
        """The process of one part is gone: what the engine computed is lost with it."""
        if self.engine.is_open:
            self.engine.stop()
        self._jobs.clear()
        for granted in self._gathered.values():
            granted.pop(number, None)
        self.part_asleep(number, 0)

    def check(self) -> None:
        self.engine.check()
        assert self.engine.is_open == (len(self._awake) == len(self.devices))


class Part:
    """One part, as a runtime handles an engine of its own."""

    def __init__(self, gang: Gang, number: int) -> None:
        self._gang, self._number = gang, number

    @property
    def owner(self) -> object:
        return self._gang.engine

    @property
    def open_bytes(self) -> int:
        return self._gang.engine.open_bytes

    @property
    def kv_bytes(self) -> int:
        return self._gang.engine.kv_bytes

    @property
    def wanted_bytes(self) -> int:
        return self._gang.engine.wanted_bytes

    def open(self) -> None:
        self._gang.part_awake(self._number)

    def close(self, keep_bytes: int) -> None:
        self._gang.part_asleep(self._number, keep_bytes)

    def set_aside(self) -> list[Job]:
        return self._gang.set_aside(self._number)

    def abort(self) -> None:
        self._gang.abort(self._number)

    def submit(self, job: Job) -> bool:
        return self._gang.submit(self._number, job)

    def cancel(self, job: Job) -> None:
        self._gang.cancel(self._number, job)

    def check(self) -> None:
        self._gang.check()


class Gangs:
    """Owner of all gangs, and of the requests that are asked of all parts of one."""

    def __init__(
        self,
        specs: Iterable[ModelSpec],
        parts: Mapping[str, tuple[int, ...]],
        devices: Sequence[Device],
        clock: Clock,
    ) -> None:
        self._clock = clock
        by_name = {spec.name: spec for spec in specs}
        self._gangs = {
            model: Gang(by_name[model], [devices[i] for i in numbers], clock)
            for model, numbers in parts.items()
        }
        self._open: list[list[Client]] = []

    def part(self, name: str) -> Part | None:
        """By the Controller's name; None for a model that has one device."""
        model, _, number = name.rpartition("#")
        gang = self._gangs.get(model)
        return None if gang is None else gang.part(int(number))

    def has(self, model: str) -> bool:
        return model in self._gangs

    def request(self, api: VirtualApi, request: str, arrival: Arrival) -> Client:
        """Asked of all parts; the first one's client tells what became of it."""
        clients = [
            api.request(
                f"{request}#{i}", part_name(arrival.model, i), arrival.prompt_tokens, arrival.output_tokens
            )
            for i in range(self._gangs[arrival.model].spec.tp)
        ]
        if not self._open:
            self._clock.after(_LOOK_S, lambda: self._look(api))
        self._open.append(clients)
        return clients[0]

    def _look(self, api: VirtualApi) -> None:
        """A request that one part was refused is given up at the others."""
        for clients in self._open:
            if any(client.over and client.ends != ["ok"] for client in clients):
                for client in clients:
                    api.abandon(client.id)
        self._open = [clients for clients in self._open if not all(client.over for client in clients)]
        if self._open:
            self._clock.after(_LOOK_S, lambda: self._look(api))


def part_specs(specs: Iterable[ModelSpec], parts: Mapping[str, tuple[int, ...]]) -> list[ModelSpec]:
    """The models that the Controller is told of."""
    listed: list[ModelSpec] = []
    for spec in specs:
        if spec.tp == 1:
            listed.append(spec)
        elif spec.name in parts:
            listed += [replace(spec, name=part_name(spec.name, i)) for i in range(spec.tp)]
    return listed


def _whole(job: Job) -> RequestId:
    """The request that this is a part of."""
    key = job.key
    assert isinstance(key, RequestKey)
    return RequestId(f"{key.request.rpartition('#')[0]}.{key.attempt}")
