"""What the devices look like while the wants are gone through.

One pass may look at hundreds of wants, so a device is looked at once, and again only after a change on it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from prism_sgl.schedulers import placement
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.memory_plan import Resident, Tally
from prism_sgl.schedulers.placement import Demand, Place
from prism_sgl.schedulers.records import (
    AWAKE,
    DRAINING,
    STARTING,
    STOPPING,
    WAKING,
    Device,
    Model,
    Role,
    Runtime,
)
from prism_sgl.schedulers.request_table import RequestTable

_COMING = frozenset({STARTING, WAKING})


def is_busy(runtime: Runtime, table: RequestTable) -> bool:
    return bool(table.queued(runtime.model.lead.name) or table.running(runtime.head.id))


def _kv_bytes_per_token(model: Model) -> int:
    facts = model.facts
    return facts.kv_bytes_per_token if facts is not None else model.config.kv_bytes_per_token


def _held_bytes(model: Model, now: float) -> float:
    """KV that it would hold with nobody beside it, and no ceiling."""
    tokens = model.load.held_tokens(model.answers.typical, model.config.slo.tpot_s, now)
    return tokens * _kv_bytes_per_token(model)


def _reads(model: Model, fleet: Fleet) -> float:
    return fleet.weights_bytes(model) / model.config.slo.tpot_s


def demand(model: Model, fleet: Fleet, now: float) -> Demand:
    config = model.config
    kv_bytes = _kv_bytes_per_token(model)
    pressure = placement.pressure(model.rate.per_s(now), kv_bytes, config.slo.tpot_s)
    # It presses a device with no more than it would get there.
    if (held := _held_bytes(model, now)) > model.runtime.most_kv_bytes:
        pressure *= model.runtime.most_kv_bytes / held
    return Demand(
        model=model.name,
        weights_bytes=fleet.weights_bytes(model),
        needed_bytes=fleet.mapped_bytes(model),
        pressure=pressure,
        devices=model.devices,
        compute=model.load.compute(model.latency, model.answers.typical, config.slo.tpot_s, now),
        noise=model.load.noise(model.latency, model.answers.typical, config.slo.tpot_s, now),
        reads=_reads(model, fleet),
    )


class Pictures:
    """Owner of the pictures of one pass. Tallies live for the whole pass: they hold its claims."""

    def __init__(self, fleet: Fleet, table: RequestTable, now: float, sleep_after_s: float) -> None:
        self._fleet = fleet
        self._table = table
        self._now = now
        self._sleep_after_s = sleep_after_s
        self._residents: dict[str, list[Resident]] = {}
        self._places: dict[str, Place] = {}
        self._tallies: dict[str, Tally] = {}
        self._possible_bytes: dict[str, int] = {}
        self._kv_unit: float | None = None

    def changed(self, device: str) -> None:
        """What sleeps or wakes there may do so with its other parts."""
        for name in self._fleet.linked[device]:
            self._residents.pop(name, None)
            self._places.pop(name, None)
            self._possible_bytes.pop(name, None)

    def kv_unit(self) -> float:
        """What makes of KVPRs parts of memory: bytes held over what they are called in KVPR's unit, of all models."""
        if self._kv_unit is None:
            models = self._fleet.models.values()
            held = math.fsum(_held_bytes(model, self._now) for model in models)
            asked = math.fsum(
                placement.pressure(
                    model.rate.per_s(self._now), _kv_bytes_per_token(model), model.config.slo.tpot_s
                )
                for model in models
            )
            self._kv_unit = held / asked if asked > 0 else 0.0
        return self._kv_unit

    def share(self, model: Model) -> Demand:
        """What each of its runtimes carries."""
        whole = demand(model, self._fleet, self._now)
        count = 1 + sum(runtime.role is Role.REPLICA for runtime in model.others)
        return replace(whole, pressure=whole.pressure / count, compute=whole.compute / count)

    def residents(self, device: Device) -> list[Resident]:
        """The models that are awake there, and the spares that sleep there.

        Parts of one model give and stay together, so each of them is as busy and as settled as all are, and none is
        there as long as another is on its way.
        """
        if (known := self._residents.get(device.name)) is not None:
            return known
        residents = [
            Resident(
                model=runtime.model.name,
                gives_bytes=self.gives_bytes(runtime),
                pinned=runtime.model.lead.pinned and runtime.role is Role.HOME,
                busy=is_busy(runtime, self._table),
                served=runtime.head.served,
                priority=runtime.model.config.priority,
                awake_since=max(each.awake_since for each in runtime.together),
                idle_since=max(each.idle_since for each in runtime.together),
                num_devices=len(runtime.together),
            )
            for runtime in device.residents.values()
            if runtime.state is AWAKE
            and all(sibling.runtime.state not in _COMING for sibling in runtime.model.siblings)
        ]
        residents += [
            self._spare(runtime)
            for runtime in device.residents.values()
            if runtime.is_spare and runtime.charged_bytes > 0
        ]
        self._residents[device.name] = residents
        return residents

    def tally(self, device: Device) -> Tally:
        if (known := self._tallies.get(device.name)) is not None:
            return known
        coming = 0
        for runtime in device.residents.values():
            if runtime.state is STOPPING:
                coming += runtime.charged_bytes
            elif runtime.state is DRAINING and self._ends_soon(runtime):
                coming += self.gives_bytes(runtime)
        return self._tallies.setdefault(device.name, Tally(device.free_bytes, coming))

    def _ends_soon(self, runtime: Runtime) -> bool:
        """Of one that drains. An operator's, or the source of a move, may take minutes: nobody waits for that but who
        has made it drain (then it has a time for its end, though a replica may take longer)."""
        return (
            runtime.sleep_sent_at is not None
            or runtime.preempt_at < math.inf
            or not self._table.running(runtime.head.id)
        )

    def gives_bytes(self, runtime: Runtime) -> int:
        """What others get when it falls asleep."""
        return runtime.charged_bytes - self._kept_asleep_bytes(runtime)

    def claims(self) -> dict[str, Tally]:
        """As they are now, for ``undo``."""
        return {name: replace(tally) for name, tally in self._tallies.items()}

    def undo(self, claims: dict[str, Tally]) -> None:
        """Forget what was claimed since."""
        self._tallies = {name: replace(tally) for name, tally in claims.items()}

    def place(self, device: Device) -> Place:
        if (known := self._places.get(device.name)) is not None:
            return known
        models = [runtime.model for runtime in device.residents.values()]
        mapped = [runtime.model for runtime in device.residents.values() if runtime.mapped]
        shares = [self.share(model) for model in mapped]
        place = Place(
            device=device.name,
            budget_bytes=device.budget_bytes,
            free_bytes=device.free_bytes,
            reclaimable_bytes=sum(
                r.gives_bytes for r in self.residents(device) if not r.pinned and not r.busy
            ),
            possible_bytes=self._possible(device),
            awake_weights_bytes=sum(map(self._fleet.weights_bytes, mapped)),
            home_weights_bytes=sum(map(self._fleet.weights_bytes, models)),
            home_reads=math.fsum(_reads(model, self._fleet) for model in models),
            pressure=math.fsum(share.pressure for share in shares),
            compute=math.fsum(share.compute for share in shares),
        )
        self._places[device.name] = place
        return place

    def places(self) -> list[Place]:
        return [self.place(device) for device in self._fleet.devices.values()]

    def possible_bytes(self, device: Device, model: Model) -> int:
        """What this model could have there if all but the pinned ones slept."""
        own = device.residents.get(model.name)
        return self._possible(device) + (0 if own is None else self._kept_bytes(own))

    def _possible(self, device: Device) -> int:
        if (known := self._possible_bytes.get(device.name)) is None:
            known = device.budget_bytes - sum(map(self._kept_bytes, device.residents.values()))
            self._possible_bytes[device.name] = known
        return known

    def _kept_bytes(self, runtime: Runtime) -> int:
        """What it has whoever wants memory."""
        if runtime.model.lead.pinned and runtime.mapped and runtime.role in (Role.HOME, Role.INCOMING):
            return runtime.charged_bytes
        return self._fleet.asleep_bytes(runtime.model) if runtime.role is Role.HOME else 0

    def _kept_asleep_bytes(self, runtime: Runtime) -> int:
        """Its part of the memory that is not given back by sleep. Only a home and a spare sleep, others are stopped."""
        sleeps = runtime.role in (Role.HOME, Role.SPARE) or runtime.keeps
        return self._fleet.asleep_bytes(runtime.model) if sleeps else 0

    def _spare(self, runtime: Runtime) -> Resident:
        """A sleeping spare, as a victim: stopped when what idle models give is not enough."""
        return Resident(
            model=runtime.model.name,
            gives_bytes=runtime.charged_bytes,
            pinned=False,
            busy=False,
            served=True,
            priority=runtime.model.config.priority,
            awake_since=-math.inf,
            idle_since=self._now - self._sleep_after_s - 0.001,
        )
