"""Policy ``prototype``: what prism-research's code does (simple_global.py and request_queue.py @ 595ec1f).

A pass every 5 s: models idle for 50 s are evicted, whatever the memory; one migration where memory per request
(requests of the last 30 s) differs by more than 15 times between two devices; models that are inactive and have
requests are activated, only here. Requests of a device run in order of arrival + SLO - clamp(prompt x 0.5 / 1024,
0.2, 2); an engine that has ten waiting gets no more. Source and target of a migration work at the same time there
(the source drains while the target loads); here the target is first, which is in its favour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from prism_sgl.schedulers.replay.cluster import Cluster, Instance, Ticket
from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.moving import Moving
from prism_sgl.schedulers.replay.spec import ModelSpec

_PASS_S = 5.0
_IDLE_S = 50.0
_WINDOW_S = 30.0
_UNSTABLE = 15.0
_CLUSTER_BYTES = 5 * 10**9
_BACKEND_QUEUE = 10


class Prototype(Moving):
    name = "prototype"

    def __init__(self) -> None:
        super().__init__(_BACKEND_QUEUE)
        self._samples: dict[str, deque[tuple[float, int]]] = {}

    def begin(self, cluster: Cluster) -> None:
        super().begin(cluster)
        self._samples = {spec.name: deque() for spec in cluster.fleet.models}
        cluster.every(1.0, lambda: self._sample(cluster))
        cluster.every(_PASS_S, lambda: self._pass(cluster))

    def order(self, waiting: Sequence[Ticket], now: float) -> list[Ticket]:
        def latest_start(ticket: Ticket) -> tuple[float, int]:
            return (
                ticket.deadline - min(2.0, max(0.2, ticket.outcome.prompt_tokens * 0.5 / 1024)),
                ticket.number,
            )

        return sorted(waiting, key=latest_start)

    def wanted(self, cluster: Cluster, spec: ModelSpec) -> None:
        """Nothing before the next pass (its weakness W14)."""

    def _sample(self, cluster: Cluster) -> None:
        for model, samples in self._samples.items():
            instance = self.serving.get(model)
            running = instance.in_flight if instance is not None else 0
            samples.append((cluster.now, running + self.waiting_of(model)))
            while samples and samples[0][0] < cluster.now - _WINDOW_S:
                samples.popleft()

    def _requests(self, model: str) -> float:
        samples = self._samples[model]
        return sum(count for _, count in samples) / len(samples) if samples else 0.0

    # ------------------------------------------------------------ the pass

    def _pass(self, cluster: Cluster) -> None:
        for instance in list(self.serving.values()):
            idle = self.is_idle(instance) and cluster.now - instance.idle_since > _IDLE_S
            if idle and not self.is_moving(instance.spec.name) and instance.spec.tp == 1:
                self.evict(cluster, instance)
        self._migrate_one(cluster)
        waiting = [m for m, tickets in self._homeless.items() if tickets and m not in self.serving]
        for model in sorted(waiting, key=lambda m: -self.waiting_of(m)):
            self._activate(cluster, cluster.specs[model])

    def _here(self, device: Device) -> list[Instance]:
        return [i for i in self.serving.values() if i.device is device and i.is_awake]

    def _memory_per_request(self, device: Device) -> float:
        here = self._here(device)
        free = device.budget_bytes - sum(i.spec.costs.weights_bytes for i in here)
        return free / max(1e-9, sum(self._requests(i.spec.name) for i in here))

    def _migrate_one(self, cluster: Cluster) -> None:
        devices = sorted(cluster.devices, key=lambda d: (self._memory_per_request(d), d.name))
        for low in devices:
            for high in reversed(devices):
                if self._memory_per_request(high) <= _UNSTABLE * self._memory_per_request(low):
                    continue
                for instance in sorted(
                    self._here(low), key=lambda i: (self._requests(i.spec.name), i.spec.name)
                ):
                    spec = instance.spec
                    if (
                        not self._requests(spec.name)
                        or spec.costs.awake_bytes > high.free_bytes
                        or spec.tp > 1
                    ):
                        continue
                    if self._calms(cluster, spec, low, high) and self.move(
                        cluster, spec, cluster.devices.index(high)
                    ):
                        return

    def _calms(self, cluster: Cluster, spec: ModelSpec, low: Device, high: Device) -> bool:
        """Does the move lower the number of unstable pairs?"""
        requests = {d: sum(self._requests(i.spec.name) for i in self._here(d)) for d in cluster.devices}
        weights = {d: sum(i.spec.costs.weights_bytes for i in self._here(d)) for d in cluster.devices}

        def unstable() -> int:
            memory = [(d.budget_bytes - weights[d]) / max(1e-9, requests[d]) for d in cluster.devices]
            return sum(a > _UNSTABLE * b for a in memory for b in memory)

        before = unstable()
        moved = self._requests(spec.name)
        requests[low] -= moved
        requests[high] += moved
        weights[low] -= spec.costs.weights_bytes
        weights[high] += spec.costs.weights_bytes
        return unstable() < before

    def _activate(self, cluster: Cluster, spec: ModelSpec) -> None:
        """On one of the devices with most free memory (within 5 GB), the one with fewest requests."""
        room = [d for d in cluster.devices if d.free_bytes >= self.needed_bytes(spec, d)]
        if not room:
            return
        most = max(d.free_bytes for d in room)
        best = [d for d in room if d.free_bytes >= most - _CLUSTER_BYTES]
        device = min(best, key=lambda d: (sum(i.in_flight for i in self._here(d)), d.name))
        self.activate(cluster, spec, (cluster.devices.index(device),))
