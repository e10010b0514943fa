"""Policies ``qlm`` and ``serverless``: one model a device at a time. Our approximations, not their code.

- ``qlm`` (QLM): requests of one model form a group; the group whose oldest request has least time left runs next;
  the model that is there ends what it runs and is swapped, which restarts the engine. A group keeps its device for
  ``turn_s`` at least while it has requests.
- ``serverless`` (ServerlessLLM): a request goes where its model is loaded; else to an empty or idle device, which
  loads it from host memory; no model is driven away while it has requests.

Neither keeps sleeping contexts: a swap pays for the engine. For ``qlm`` that is our own measured start from waiting
workers (its paper restarts vLLM, which takes longer), for ``serverless`` the copy at the link's speed + 1 s.
"""

from __future__ import annotations

import math
from collections import deque

from prism_sgl.schedulers.replay.cluster import Cluster, Instance, Ticket
from prism_sgl.schedulers.replay.spec import ModelSpec

_ENGINE_S = 1.0
_CHECK_S = 0.5


class Swapping:
    """Owner of the queues by model and of who has which device."""

    def __init__(self, name: str, *, turn_s: float) -> None:
        self.name = name
        self._turn_s = turn_s
        self._waiting: dict[str, deque[Ticket]] = {}
        self._there: dict[int, Instance] = {}  # number of its first device -> the model there
        self._since: dict[int, float] = {}
        self._spans: dict[str, Instance] = {}  # tp > 1: where they are from the begin

    def begin(self, cluster: Cluster) -> None:
        taken: set[int] = set()
        for spec in sorted(cluster.fleet.models, key=lambda m: (-m.tp, -m.costs.weights_bytes, m.name)):
            room = [i for i in range(len(cluster.devices)) if i not in taken]
            if len(room) < spec.tp:
                continue
            instance = cluster.add(spec.name, room[: spec.tp])
            if instance is None or not cluster.open_at_once(instance):
                continue
            taken.update(room[: spec.tp])
            if spec.tp > 1:
                self._spans[spec.name] = instance
            else:
                self._there[room[0]], self._since[room[0]] = instance, 0.0
        cluster.every(_CHECK_S, lambda: self._look(cluster))

    def arrived(self, cluster: Cluster, ticket: Ticket) -> None:
        model = ticket.spec.name
        if ticket.spec.tp > 1:
            if model in self._spans:
                cluster.run_on(ticket, self._spans[model])
            else:
                cluster.fail(ticket, "no devices have room for its model")
            return
        self._waiting.setdefault(model, deque()).append(ticket)
        self._look(cluster)

    def progressed(self, cluster: Cluster, instance: Instance) -> None:
        if not instance.in_flight:
            self._look(cluster)

    # ------------------------------------------------------------ who is where

    def _look(self, cluster: Cluster) -> None:
        for number, instance in list(self._there.items()):
            if instance.is_awake and not self._shall_leave(cluster, number, instance):
                self._feed(cluster, instance)
        for model in sorted((m for m, q in self._waiting.items() if q), key=self._urgency):
            if not any(i.spec.name == model for i in self._there.values()):
                self._bring(cluster, cluster.specs[model])

    def _urgency(self, model: str) -> tuple[float, str]:
        queue = self._waiting[model]
        return (queue[0].deadline if queue else math.inf, model)

    def _shall_leave(self, cluster: Cluster, number: int, instance: Instance) -> bool:
        """Its turn is over, and a group that is nowhere has less time left."""
        if self.name != "qlm" or cluster.now - self._since[number] < self._turn_s:
            return False
        homes = {i.spec.name for i in self._there.values()}
        others = [m for m, q in self._waiting.items() if q and m not in homes]
        if not others:
            return False
        own = self._urgency(instance.spec.name)[0] if self._waiting.get(instance.spec.name) else math.inf
        return min(map(self._urgency, others))[0] < own

    def _feed(self, cluster: Cluster, instance: Instance) -> None:
        queue = self._waiting.get(instance.spec.name)
        while queue and instance.in_flight < instance.spec.costs.max_running:
            cluster.run_on(queue.popleft(), instance)

    def _bring(self, cluster: Cluster, spec: ModelSpec) -> None:
        """To a device that is empty, or whose model is idle, the longest idle first."""
        taken = {d for i in self._spans.values() for d in i.devices}
        for number, device in enumerate(cluster.devices):
            if number not in self._there and device not in taken:
                self._load(cluster, spec, number)
                return
        idle = [
            (instance.idle_since, number)
            for number, instance in self._there.items()
            if instance.is_awake
            and not instance.in_flight
            and (not self._waiting.get(instance.spec.name) or self._shall_leave(cluster, number, instance))
        ]
        if idle:
            number = min(idle)[1]
            old = self._there.pop(number)
            cluster.sleep(old, lambda: cluster.remove(old))
            self._load(cluster, spec, number)

    def _load(self, cluster: Cluster, spec: ModelSpec, number: int) -> None:
        instance = cluster.add(spec.name, (number,))
        if instance is None:
            return
        self._there[number] = instance
        costs = spec.costs
        seconds = costs.start_s if self.name == "qlm" else costs.wake_s + _ENGINE_S

        def awake() -> None:
            self._since[number] = cluster.now
            self._feed(cluster, instance)

        cluster.wake(instance, awake, seconds=seconds)
