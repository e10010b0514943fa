"""What policies share that wake, sleep and move models: one queue a device, one serving instance a model.

A move is target first: the source serves until the target is awake, then the queue switches, and the source drains
and leaves (Prism section 6.1). Subclasses say where models go, when, and in which order requests run.

A model that is awake nowhere keeps one sleeping context, charged where it slept last, as each of the Controller's
models does; that it may wake elsewhere at the price of a wake is in favour of these policies (their engine pools).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from prism_sgl.schedulers.replay.cluster import Cluster, Instance, Ticket
from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.spec import ModelSpec

# Ordering a long queue anew for each request would cost more than it brings (as schedulers/grants.py has it).
_ALWAYS_ORDER = 64
_ORDER_INTERVAL_S_PER_REQUEST = 50e-6


class _Queue:
    """Requests that wait for one model, and the order of all that wait for one device."""

    def __init__(self) -> None:
        self.tickets: dict[int, Ticket] = {}
        self.order: deque[Ticket] = deque()
        self.made_at = 0.0
        self.stale = True


class Moving:
    """Owner of who serves what. ``window``: requests of one engine without a first token."""

    name = "moving"

    def __init__(self, window: int) -> None:
        self._window = window
        self.serving: dict[str, Instance] = {}
        self._asleep: dict[str, Instance] = {}  # of models that serve nowhere
        self._moves: dict[str, Instance] = {}  # model -> target that wakes
        self._leaving: dict[Instance, None] = {}  # sources that end what they have
        self._homeless: dict[str, list[Ticket]] = {}  # of models that are awake nowhere
        self._queues: dict[Device, _Queue] = {}

    # ------------------------------------------------------------ for subclasses

    def order(self, waiting: Sequence[Ticket], now: float) -> list[Ticket]:
        raise NotImplementedError

    def begin(self, cluster: Cluster) -> None:
        """Nothing is known of the load: by weights alone, the largest first, to the device with most room."""
        self._queues = {device: _Queue() for device in cluster.devices}
        for spec in sorted(cluster.fleet.models, key=lambda m: (-m.tp, -m.costs.weights_bytes, m.name)):
            chosen = sorted(range(len(cluster.devices)), key=lambda i: -cluster.devices[i].free_bytes)
            instance = cluster.add(spec.name, chosen[: spec.tp])
            if instance is None:
                continue
            if cluster.open_at_once(instance):
                self.serving[spec.name] = instance
            else:
                self._asleep[spec.name] = instance

    def activate(self, cluster: Cluster, spec: ModelSpec, devices: Sequence[int]) -> bool:
        """Wake it there; its requests are kept until it is awake."""
        homes = tuple(cluster.devices[i] for i in devices)
        instance = self._asleep.get(spec.name)
        if instance is None or instance.devices != homes:
            self._forget_context(cluster, spec.name)
            instance = cluster.add(spec.name, devices)
        else:
            del self._asleep[spec.name]
        if instance is None:
            return False
        self.serving[spec.name] = instance
        cluster.wake(instance, lambda: self._awake(cluster, instance))
        return True

    def needed_bytes(self, spec: ModelSpec, device: Device) -> int:
        """To be awake there, beside a context that it may keep there."""
        asleep = self._asleep.get(spec.name)
        kept = asleep is not None and device in asleep.devices
        return spec.costs.awake_bytes - (spec.costs.asleep_bytes if kept else 0)

    def _forget_context(self, cluster: Cluster, model: str) -> None:
        if (asleep := self._asleep.pop(model, None)) is not None:
            cluster.remove(asleep)

    def move(self, cluster: Cluster, spec: ModelSpec, device: int) -> bool:
        source = self.serving.get(spec.name)
        if source is None or not source.is_awake or spec.name in self._moves or spec.tp > 1:
            return False
        target = cluster.add(spec.name, (device,))
        if target is None:
            return False
        self._moves[spec.name] = target
        cluster.moves_from(source)
        cluster.wake(target, lambda: self._switch(cluster, spec.name, source, target))
        return True

    def evict(self, cluster: Cluster, instance: Instance) -> None:
        """Idle, or it drains first. Its next request activates it again, wherever that is best then."""
        if self.serving.get(instance.spec.name) is instance:
            del self.serving[instance.spec.name]
        self._leaving[instance] = None
        self._leave_if_drained(cluster, instance)

    def waiting_of(self, model: str) -> int:
        queued = sum(t.spec.name == model for q in self._queues.values() for t in q.tickets.values())
        return queued + len(self._homeless.get(model, ()))

    def is_idle(self, instance: Instance) -> bool:
        return instance.is_awake and not instance.in_flight and not self.waiting_of(instance.spec.name)

    def is_moving(self, model: str) -> bool:
        return model in self._moves

    # ------------------------------------------------------------ requests

    def arrived(self, cluster: Cluster, ticket: Ticket) -> None:
        model = ticket.spec.name
        instance = self.serving.get(model)
        if instance is None or not instance.is_awake:
            self._homeless.setdefault(model, []).append(ticket)
            if instance is None:
                self.wanted(cluster, ticket.spec)
            return
        self._enqueue(ticket, instance)
        self.dispatch(cluster, instance.device)

    def wanted(self, cluster: Cluster, spec: ModelSpec) -> None:
        """A request came for a model that is awake nowhere."""
        raise NotImplementedError

    def progressed(self, cluster: Cluster, instance: Instance) -> None:
        if instance in self._leaving:
            self._leave_if_drained(cluster, instance)
        self.dispatch(cluster, instance.device)

    def dispatch(self, cluster: Cluster, device: Device) -> None:
        queue = self._queues[device]
        if not queue.tickets:
            return
        pause_s = len(queue.tickets) * _ORDER_INTERVAL_S_PER_REQUEST
        if queue.stale and (
            len(queue.tickets) <= _ALWAYS_ORDER or cluster.now - queue.made_at >= pause_s or not queue.order
        ):
            queue.order = deque(self.order(list(queue.tickets.values()), cluster.now))
            queue.made_at, queue.stale = cluster.now, False
        kept: list[Ticket] = []
        full: set[str] = set()
        while queue.order and len(full) < len(self.serving):
            ticket = queue.order.popleft()
            model = ticket.spec.name
            instance = self.serving.get(model)
            if ticket.number not in queue.tickets:
                continue
            if model in full or instance is None or not self._is_open(instance):
                full.add(model)
                kept.append(ticket)
                if len(kept) > 4 * _ALWAYS_ORDER:
                    break
                continue
            del queue.tickets[ticket.number]
            cluster.run_on(ticket, instance)
        queue.order.extendleft(reversed(kept))

    def _is_open(self, instance: Instance) -> bool:
        if not instance.is_awake or instance.in_flight >= instance.spec.costs.max_running + 2:
            return False
        return instance.unanswered < self._window

    def _enqueue(self, ticket: Ticket, instance: Instance) -> None:
        queue = self._queues[instance.device]
        queue.tickets[ticket.number] = ticket
        queue.stale = True

    # ------------------------------------------------------------ ends of wakes and moves

    def _awake(self, cluster: Cluster, instance: Instance) -> None:
        for ticket in self._homeless.pop(instance.spec.name, ()):
            self._enqueue(ticket, instance)
        self.dispatch(cluster, instance.device)

    def _switch(self, cluster: Cluster, model: str, source: Instance, target: Instance) -> None:
        del self._moves[model]
        self.serving[model] = target
        queue = self._queues[source.device]
        for ticket in [t for t in queue.tickets.values() if t.spec.name == model]:
            del queue.tickets[ticket.number]
            self._enqueue(ticket, target)
        self._leaving[source] = None
        self._leave_if_drained(cluster, source)
        self._awake(cluster, target)

    def _leave_if_drained(self, cluster: Cluster, instance: Instance) -> None:
        if instance.is_awake and not instance.in_flight:
            del self._leaving[instance]
            cluster.sleep(instance, lambda: self._slept(cluster, instance))

    def _slept(self, cluster: Cluster, instance: Instance) -> None:
        if instance.spec.name in self.serving:
            cluster.remove(instance)
        else:
            self._asleep[instance.spec.name] = instance
