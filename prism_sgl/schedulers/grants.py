"""Local scheduler at work: which queued request of a device is granted next, and when.

Two windows keep engines' own queues short, where nothing can be ordered across models, or kept for a model that takes
turns. Of a device: ``WINDOW_US`` of prefill that has not brought its first token, or ``prefill_window`` requests if
those are more; a runtime that has none of them is open all the same, for engines work side by side. Of a runtime: all
that it runs, and ``WINDOW_EXTRA`` more. And nothing is granted that would not fit: what requests in flight hold on
average against the KV that the model may have. A runtime that has nothing in flight always gets a request. What is
short of KV, or soon will be, is told by ``take_shortages``, for an engine that is given no request asks for no memory.
A request of a model over several devices is granted on that of its lead, where all of them have room for it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from prism_sgl.config import SchedulerConfig
from prism_sgl.messages import Due, Grant
from prism_sgl.schedulers import dispatch
from prism_sgl.schedulers.events import Outbox
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.records import Device, Model, Phase, Request, Runtime
from prism_sgl.schedulers.request_table import RequestTable

# Two more than the engine runs at once: the next ones are there when one ends, the rest stay here, where they
# can still be ordered, abandoned, or kept for a model that takes turns.
WINDOW_EXTRA = 2
# An engine's passes need enough to take: short prompts share one, and a grant is on its way for as long as one takes.
# Counted in requests alone (four), a window makes bursts of short prompts wait for several ways there and back. 250 ms
# of tokens keeps the throughput of no window at all (tests/schedulers/test_dispatch_window.py: 1 % less on a trace of
# chats, 3 % on long prompts alone), and is what an urgent request may find before it in its engine.
WINDOW_US = 250_000
# Ordering costs about 1.5 us a request. Short queues are ordered for every grant, long ones at intervals that
# keep the cost at a few per cent of the time; what came in meanwhile runs after them.
_ALWAYS_ORDER = 64
_ORDER_INTERVAL_S_PER_REQUEST = 50e-6


@dataclass(slots=True)
class _Order:
    """The last order of a device, split by model so that one with a full window costs nothing."""

    # With the place in the order: a request of a model with replicas has another one on each of its devices.
    by_model: dict[str, deque[tuple[int, Request]]] = field(default_factory=dict)
    again_at: float = 0.0  # made anew before only where it must be
    size: int = 0
    stale: bool = True
    held_back: set[str] = field(default_factory=set)  # devices whose KV alone somebody waits for
    since_aged: int = dispatch.AGED_EVERY  # grants since the last one of an aged request


# Requests are granted by what they hold on average (prompt and half of the answer: they stand at different points of
# theirs), room is made for the height: all at their ends, 1.5 times as much for the chats of Arena-Chat (136 tokens in,
# 256 out). Granted by the height, a tenth of a card stood empty while requests waited for it.
_HEIGHT = 1.5


@dataclass(frozen=True, slots=True)
class Shortage:
    """Memory that requests in flight on one device will want for KV, and idle models hold."""

    missing_bytes: int
    waits: bool  # a request is held back for it; else it is only expected to be wanted


class Granter:
    """Owner of the orders of all devices."""

    def __init__(self, config: SchedulerConfig, fleet: Fleet, table: RequestTable, out: Outbox) -> None:
        self._config = config
        self._fleet = fleet
        self._table = table
        self._out = out
        self._orders = {name: _Order() for name in fleet.devices}
        self._open: dict[str, None] = {}  # devices on which a grant may have become possible
        self._look_at: dict[str, float] = {}  # devices whose order leaves somebody out, until when
        self._shortages: dict[str, Shortage] = {}

    def changed(self, model: Model) -> None:
        """A request was queued, or the model woke: the order of its device is no longer right."""
        for runtime in model.lead.serving:
            assert runtime.device is not None
            self._orders[runtime.device].stale = True
            self._open[runtime.device] = None

    def freed(self, *devices: str | None) -> None:
        """A first token is out, a request is over or a neighbour asleep: there may be room."""
        for device in devices:
            if device is not None:
                self._open.update(dict.fromkeys(self._fleet.linked[device]))

    def take_shortages(self) -> dict[str, Shortage]:
        """Of each device on which something has changed since the last call; all zero where nothing is missing."""
        shortages, self._shortages = self._shortages, {}
        return shortages

    @property
    def next_at(self) -> float:
        """When time alone may change something."""
        return min(self._look_at.values(), default=math.inf)

    def run(self, now: float) -> None:
        for name in [name for name, at in self._look_at.items() if at <= now]:
            del self._look_at[name]
            self._open[name] = None
        while self._open:
            name, _ = self._open.popitem()
            device = self._fleet.devices.get(name)
            if device is not None:
                self._grant_all(device, now)

    def _grant_all(self, device: Device, now: float) -> None:
        order = self._orders[device.name]
        held_before = set(order.held_back)
        while (request := self._next(device, now)) is not None:
            self._grant(device.residents[request.model], request, now)
        if changed := (held_before ^ order.held_back) - {device.name}:
            self._open.update(dict.fromkeys(sorted(changed)))  # theirs is another shortage now
        waits = any(
            device.name in self._orders[linked].held_back for linked in self._fleet.linked[device.name]
        )
        device.wanted_kv_bytes = sum(
            self._over_floor_bytes(runtime, _HEIGHT)
            for runtime in device.residents.values()
            if runtime.mapped
        )
        missing_bytes = device.wanted_kv_bytes - max(0, device.free_bytes)
        self._shortages[device.name] = Shortage(max(missing_bytes, 1 if waits else 0), waits)

    def _over_floor_bytes(self, runtime: Runtime, height: float) -> int:
        if (facts := runtime.model.facts) is None:
            return 0
        tokens = self._table.kv_tokens(runtime.head.id) * height
        return max(0, round(tokens * facts.kv_bytes_per_token) - facts.floor_bytes)

    def _next(self, device: Device, now: float) -> Request | None:
        """Of all models with an open window, the request that stands first in the order."""
        full = self._is_full(device)
        if full and not any(
            self._table.queued(name) and self._has_no_prefill(runtime)
            for name, runtime in device.residents.items()
        ):
            return None
        order = self._orders[device.name]
        if order.stale and (
            order.size <= _ALWAYS_ORDER or now >= order.again_at or not any(order.by_model.values())
        ):
            self._make(device, order, now)
        order.held_back.clear()
        best: tuple[int, Request] | None = None
        for name, requests in order.by_model.items():
            while requests and requests[0][1].phase is not Phase.QUEUED:
                requests.popleft()
            if not requests or (best is not None and best[0] < requests[0][0]):
                continue
            runtime = device.residents.get(name)
            if runtime is None or not self._is_open(runtime):
                continue
            if (full or self._is_full_beside(runtime)) and not self._has_no_prefill(runtime):
                continue
            request = requests[0][1]
            if lacking := self._lacking(runtime, request):
                order.held_back.update(lacking)
            elif not runtime.model.others or not self._is_better_elsewhere(runtime, request):
                best = requests[0]
        if best is None and order.stale and order.size:
            if self._leaves_out_some(device, order):
                self._make(device, order, now)
                return self._next(device, now)
            if order.held_back:
                self._look_at[device.name] = order.again_at  # who came since may want less
        return None if best is None else best[1]

    def _leaves_out_some(self, device: Device, order: _Order) -> bool:
        """All that an open runtime has to do came after the order was made. Of others the turn can wait: while nothing
        may be granted each event would order all that is queued."""
        return any(
            self._table.queued(name) and not order.by_model.get(name) and self._is_open(runtime)
            for name, runtime in device.residents.items()
        )

    def _is_better_elsewhere(self, runtime: Runtime, request: Request) -> bool:
        """Another runtime of the model has less to do, and may take this request at once."""
        num_running = len(self._table.running(runtime.id))
        for other in runtime.model.serving:
            if (
                len(self._table.running(other.id)) < num_running
                and self._is_open(other)
                and self._has_no_prefill(other)
                and not self._lacking(other, request)
            ):
                self._open[other.device or ""] = None
                return True
        return False

    def _is_full(self, device: Device) -> bool:
        """Its window. A prefill is measured beside others, and takes as many times longer as runtimes compute."""
        name = device.name
        return len(self._table.unanswered(name)) >= self._config.prefill_window and self._table.tokens_us(
            name
        ) >= WINDOW_US * self._table.num_computing(device)

    def _is_full_beside(self, runtime: Runtime) -> bool:
        """Where another part of its model is."""
        return any(self._is_full(self._fleet.devices[s.devices[0]]) for s in runtime.model.siblings)

    def _has_no_prefill(self, runtime: Runtime) -> bool:
        return runtime.id is not None and not self._table.needed_us(runtime.id)

    def _is_open(self, runtime: Runtime) -> bool:
        facts = runtime.model.facts
        return (
            runtime.serves
            and facts is not None
            and len(self._table.running(runtime.id)) < facts.max_running_requests + WINDOW_EXTRA
        )

    def _lacking(self, runtime: Runtime, request: Request) -> list[str]:
        """Devices where its KV does not hold the request."""
        if not self._table.running(runtime.id):
            return []
        return [each.device for each in runtime.together if each.device and not self._fits(each, request)]

    def _fits(self, runtime: Runtime, request: Request) -> bool:
        """The runtime's KV holds it on average: the floor, and what nobody was promised or is expected to take."""
        facts, device = runtime.model.facts, self._fleet.devices[runtime.device or ""]
        if facts is None:
            return True
        room_bytes: float = facts.floor_bytes + max(0, device.free_bytes)
        for other in device.residents.values():
            if other is not runtime and other.mapped:
                room_bytes -= self._over_floor_bytes(other, 1.0)
        room_bytes = max(facts.floor_bytes, min(room_bytes, runtime.most_kv_bytes))
        tokens = self._table.kv_tokens(runtime.head.id) + request.kv_tokens
        return tokens * facts.kv_bytes_per_token <= room_bytes

    def _make(self, device: Device, order: _Order, now: float) -> None:
        models, queued = self._fleet.models, self._table.queued
        waiting = [
            request
            for name in self._table.queued_models()
            if (runtime := device.residents.get(name)) is not None and runtime.serves
            for request in queued(name).values()
        ]
        ordered = dispatch.order(
            waiting,
            now,
            lambda request: models[request.model].latency.estimate_s(request.prompt_tokens),
            max_wait_s=self._config.max_wait_s,
            since_aged=order.since_aged,
        )
        order.by_model = {}
        for rank, request in enumerate(ordered):
            order.by_model.setdefault(request.model, deque()).append((rank, request))
        order.again_at = now + len(ordered) * _ORDER_INTERVAL_S_PER_REQUEST
        order.size, order.stale = len(ordered), False

    def _grant(self, runtime: Runtime, request: Request, now: float) -> None:
        model = runtime.model
        assert runtime.id is not None
        assert runtime.device is not None
        order = self._orders[runtime.device]
        is_aged = dispatch.aged_at(request, self._config.max_wait_s) < now
        order.since_aged = 0 if is_aged else order.since_aged + 1
        needed_s = model.latency.estimate_s(request.prompt_tokens)
        request.needed_us = max(1, round(needed_s * 1e6))
        request.tokens_us = round((needed_s - model.latency.alpha_s) * 1e6)
        request.ahead_us = self._table.needed_us(runtime.id)
        devices = tuple(each.device for each in runtime.together if each.device)
        self._table.grant(request, runtime.id, devices, now)
        self._open.update(dict.fromkeys(devices[1:]))
        runtime.served = True
        model.rate.add(request.prompt_tokens, now)
        activation_s = min(now, runtime.awake_since) - max(request.arrival, model.activating_since)
        self._out.api(
            request.api,
            Grant(
                request=request.id,
                attempt=request.attempt,
                runtime=runtime.id,
                queued_s=now - request.arrival,
                activation_s=max(0.0, activation_s),
                due=_due(request, model, now),
            ),
        )

    def repeat_unstarted(self, now: float, after_s: float) -> None:
        """Grants that no runtime has confirmed are sent again. An api_server ignores one that it has obeyed, and
        answers Abandon for a request that it no longer has: so a lost frame costs seconds, not a slot for ever."""
        for device in self._fleet.devices:
            for request in self._table.unanswered(device).values():
                if request.phase is Phase.GRANTED and now - request.since >= after_s:
                    request.since = now
                    assert request.runtime is not None
                    self._out.api(
                        request.api,
                        Grant(
                            request=request.id,
                            attempt=request.attempt,
                            runtime=request.runtime,
                            queued_s=now - request.arrival,
                            due=_due(request, self._fleet.models[request.model], now),
                        ),
                    )


def _due(request: Request, model: Model, now: float) -> Due:
    return Due(
        in_s=request.deadline - now,
        waited_s=now - request.arrival,
        priority=request.priority,
        needed_s=model.latency.estimate_s(request.prompt_tokens),
    )
