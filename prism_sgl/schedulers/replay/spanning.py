"""Engines over several devices (tp > 1) for a Controller whose runtimes have one device each.

Live, tp > 1 is refused. In a replay of policy ``prism`` such a model is ``tp`` models of the Controller, one a part,
bound to its device and configured as parts of the first one (``part_of``), which has the requests. The engine computes
while all parts are awake; requests that it has when one of them sleeps wait until all are awake again.

Parts stand on groups of ``tp`` devices that begin at multiples of ``tp`` (no two on one device, Prism A.2.2). So two
such models share all devices of the smaller one or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Clock, Device
from prism_sgl.schedulers.replay.engine import Engine
from prism_sgl.schedulers.replay.spec import ModelSpec


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
    """The first part is the one that the Controller gives requests to."""
    return f"{model}#{number}" if number else model


def part_specs(
    specs: Iterable[ModelSpec], parts: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[ModelSpec, tuple[str, ...], str]]:
    """The models that the Controller is told of, their devices (none: any), and of which model they are another
    part."""
    for spec in specs:
        if spec.tp == 1:
            yield spec, (), ""
        for number, device in enumerate(parts.get(spec.name, ())):
            name = part_name(spec.name, number)
            yield replace(spec, name=name), (f"gpu{device}",), spec.name if number else ""


class Gang:
    """Owner of one engine over several devices, of which of its parts are awake, and of the requests that wait until
    all are.

    Invariant: the engine is open exactly while all parts are awake; each awake part holds ``open_bytes`` of its
    device in the engine's name, more only while the engine has requests.
    """

    def __init__(self, spec: ModelSpec, devices: Sequence[Device], clock: Clock) -> None:
        self.devices = tuple(devices)
        self.engine = Engine(spec.name, spec.costs, devices, clock)
        self._awake: set[int] = set()
        self._aside: list[Job] = []

    def part(self, number: int) -> Part:
        return Part(self, number)

    def part_awake(self, number: int) -> None:
        self._awake.add(number)
        if len(self._awake) == len(self.devices):
            self.engine.open()
            aside, self._aside = self._aside, []
            for job in aside:
                self.engine.submit(job)

    def part_asleep(self, number: int, keep_bytes: int) -> None:
        """None can go on without it."""
        if self.engine.is_open:
            self._aside += self.engine.set_aside()
            self.engine.shut()
        self._awake.discard(number)
        device = self.devices[number]
        device.release(self.engine, device.held_by(self.engine) - keep_bytes)

    def submit(self, job: Job) -> None:
        if self.engine.is_open:
            self.engine.submit(job)
        else:
            self._aside.append(job)

    def cancel(self, job: Job) -> None:
        if job in self._aside:
            self._aside.remove(job)
        else:
            self.engine.cancel(job)

    def abort(self, number: int) -> None:
        """The process of one part is gone: what the engine computed is lost with it."""
        self.part_asleep(number, 0)
        self._aside.clear()

    def check(self) -> None:
        self.engine.check()
        assert self.engine.is_open == (len(self._awake) == len(self.devices))
        assert not (self.engine.is_open and self._aside)


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
        """The gang keeps them: they wait for all parts, not for this one."""
        return []

    def abort(self) -> None:
        self._gang.abort(self._number)

    def submit(self, job: Job) -> None:
        self._gang.submit(job)

    def cancel(self, job: Job) -> None:
        self._gang.cancel(job)

    def check(self) -> None:
        self._gang.check()


def parts_by_name(
    specs: Iterable[ModelSpec],
    parts: Mapping[str, tuple[int, ...]],
    devices: Sequence[Device],
    clock: Clock,
) -> dict[str, Part]:
    """By the Controller's names."""
    by_name = {spec.name: spec for spec in specs}
    named: dict[str, Part] = {}
    for model, numbers in parts.items():
        gang = Gang(by_name[model], [devices[i] for i in numbers], clock)
        named |= {part_name(model, number): gang.part(number) for number in range(len(numbers))}
    return named
