"""Policy ``paper``: Prism's Algorithms 1 and 2 as printed (OSDI 2026, sections 6.1 and 6.2).

As printed means: the target is the device of the lowest pressure *before* the model is added, the whole placement
is built again from empty devices in each pass, TPOT is not looked at beyond w, Algorithm 2 has no hopeless-first
rule, no ageing and no intercept (e = p / c). What the paper leaves open is chosen in its favour: requests that
Algorithm 2 drops run after the others, a pass comes every 5 s, a move that would not fit is left out (the printed
algorithm has no fit test, and a model without memory would never answer), and tau is a part of the largest
pressure (an absolute one depends on the machine: R found 0.0129 where others needed 0.35); the best part is tried.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from prism_sgl.schedulers.latency import TokenRate
from prism_sgl.schedulers.replay.cluster import Cluster, Instance, Ticket
from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.moving import Moving
from prism_sgl.schedulers.replay.spec import ModelSpec

_PASS_S = 5.0
_WINDOW_S = 60.0  # App. A.4
_IDLE_S = 45.0  # App. A.4
_CONSTRAINED = 0.10  # of a device free, or less: memory is wanted


class Paper(Moving):
    """``tau``: a move has to lower the pressure by so much of the largest one."""

    name = "paper"

    def __init__(self, *, tau: float = 0.1, window: int = 16) -> None:
        super().__init__(window)
        self._tau = tau
        self._rates: dict[str, TokenRate] = {}

    def begin(self, cluster: Cluster) -> None:
        super().begin(cluster)
        self._rates = {spec.name: TokenRate(_WINDOW_S) for spec in cluster.fleet.models}
        cluster.every(_PASS_S, lambda: self._pass(cluster))

    # ------------------------------------------------------------ Algorithm 1

    def _w(self, spec: ModelSpec, now: float) -> float:
        rate = self._rates[spec.name].per_s(now)
        return rate * spec.costs.kv_bytes_per_token * spec.tp / spec.slo.tpot_s

    def _pass(self, cluster: Cluster) -> None:
        self._evict_idle(cluster)
        now, devices = cluster.now, cluster.devices
        shared = [float(d.budget_bytes) for d in devices]
        pressure = [0.0] * len(devices)
        present = {m: i.device for m, i in self.serving.items() if i.is_awake}
        models = [cluster.specs[m] for m in present]
        for spec in sorted(models, key=lambda s: (-self._w(s, now), s.name)):
            at = devices.index(present[spec.name])
            if spec.tp > 1:
                homes = [devices.index(d) for d in self.serving[spec.name].devices]
                target = at
            else:
                ratios = [_ratio(w, s) for w, s in zip(pressure, shared, strict=True)]
                best = min(range(len(devices)), key=lambda i: (ratios[i], i))
                gain = ratios[at] - ratios[best]
                target = best if gain > self._tau * self._largest(cluster) else at
                homes = [target]
            for home in homes:
                pressure[home] += self._w(spec, now) / len(homes)
                shared[home] -= spec.costs.weights_bytes
            if target != at and self._has_room(spec, devices[target]):
                self.move(cluster, spec, target)

    def _largest(self, cluster: Cluster) -> float:
        return max((self.kvpr(cluster, device) for device in cluster.devices), default=0.0)

    def kvpr(self, cluster: Cluster, device: Device) -> float:
        here = [i for i in self.serving.values() if device in i.devices]
        total = sum(self._w(i.spec, cluster.now) / len(i.devices) for i in here)
        return _ratio(total, device.budget_bytes - sum(i.spec.costs.weights_bytes for i in here))

    def _has_room(self, spec: ModelSpec, device: Device) -> bool:
        return self.needed_bytes(spec, device) <= device.free_bytes

    # ------------------------------------------------------------ eviction and activation (section 6.1)

    def _evict_idle(self, cluster: Cluster) -> None:
        for instance in list(self.serving.values()):
            device = instance.device
            constrained = device.free_bytes < _CONSTRAINED * device.budget_bytes or any(
                self._homeless.values()
            )
            idle = self.is_idle(instance) and cluster.now - instance.idle_since > _IDLE_S
            if idle and constrained and not self.is_moving(instance.spec.name):
                self.evict(cluster, instance)
        for model, tickets in list(self._homeless.items()):
            if tickets and model not in self.serving:
                self.wanted(cluster, cluster.specs[model])

    def wanted(self, cluster: Cluster, spec: ModelSpec) -> None:
        """At once, on the devices of the lowest pressure that have or can make room."""
        ranked = sorted(cluster.devices, key=lambda d: (self.kvpr(cluster, d), d.name))
        victims: dict[Instance, None] = {}
        chosen: list[int] = []
        for device in ranked:
            gives = self._victims(cluster, spec, device)
            if gives is not None and len(chosen) < spec.tp:
                chosen.append(cluster.devices.index(device))
                victims.update(dict.fromkeys(gives))
        if len(chosen) == spec.tp:
            for victim in victims:
                self.evict(cluster, victim)
            self.activate(cluster, spec, sorted(chosen))

    def _victims(self, cluster: Cluster, spec: ModelSpec, device: Device) -> list[Instance] | None:
        """Models idle for the threshold that make room there; the wake waits for what they give. None: too few."""
        missing = self.needed_bytes(spec, device) - device.free_bytes
        idle = [i for i in self.serving.values() if device in i.devices and self.is_idle(i)]
        victims: list[Instance] = []
        for instance in sorted(idle, key=lambda i: (i.idle_since, i.spec.name)):
            if missing > 0 and cluster.now - instance.idle_since > _IDLE_S:
                victims.append(instance)
                missing -= instance.spec.costs.awake_bytes - instance.spec.costs.asleep_bytes
        return victims if missing <= 0 else None

    # ------------------------------------------------------------ Algorithm 2

    def arrived(self, cluster: Cluster, ticket: Ticket) -> None:
        self._rates[ticket.spec.name].add(ticket.outcome.prompt_tokens, cluster.now)
        super().arrived(cluster, ticket)

    def progressed(self, cluster: Cluster, instance: Instance) -> None:
        rate = self._rates[instance.spec.name]
        rate.add(instance.take_written(), cluster.now)
        super().progressed(cluster, instance)

    def order(self, waiting: Sequence[Ticket], now: float) -> list[Ticket]:
        return moore_hodgson(waiting, now)


def moore_hodgson(waiting: Sequence[Ticket], now: float) -> list[Ticket]:
    """S in order of deadlines, then those that were dropped from it, oldest first."""
    taken: list[Ticket] = []
    longest: list[tuple[float, int]] = []
    dropped: set[int] = set()
    at = now
    for ticket in sorted(waiting, key=lambda t: (t.deadline, t.number)):
        needed_s = ticket.outcome.prompt_tokens * ticket.spec.costs.prefill_s_per_token
        heapq.heappush(longest, (-needed_s, len(taken)))
        taken.append(ticket)
        at += needed_s
        if at > ticket.deadline:
            minus_s, index = heapq.heappop(longest)
            dropped.add(index)
            at += minus_s
    late = sorted((taken[i] for i in dropped), key=lambda t: t.number)
    return [t for i, t in enumerate(taken) if i not in dropped] + late


def _ratio(pressure: float, shared: float) -> float:
    return math.inf if shared <= 0 else pressure / shared
