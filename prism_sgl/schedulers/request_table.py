"""Every request that the controller knows, and where it is."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from prism_sgl.messages import RequestId, RuntimeId
from prism_sgl.schedulers.records import Device, Phase, Request

# Ends are remembered so that a repeated Submit or a late ApiHello does not bring a finished request back to
# life. At 1000 requests/s this is 16 s, far longer than a message travels.
_REMEMBERED_ENDS = 16384
K = TypeVar("K", bound=str)
_NOTHING: Mapping[RequestId, Request] = {}


class RequestTable:
    """Owner of all live requests.

    Invariants: a request is either in the queue of its model or in flight on one runtime, never in both; an id
    is live once; ``unanswered`` holds exactly those in flight whose first token is not out, on each of their devices,
    but for those that were set aside; ``kv_tokens`` of a runtime is the sum over those in flight there, ``needed_us``
    of a runtime and ``tokens_us`` of a device are sums over their unanswered ones.
    """

    def __init__(self, activation_timeout_s: float) -> None:
        self._timeout_s = activation_timeout_s
        self._live: dict[RequestId, Request] = {}
        self._queues: dict[str, dict[RequestId, Request]] = {}
        self._running: dict[RuntimeId, dict[RequestId, Request]] = {}
        self._by_api: dict[str, dict[RequestId, Request]] = {}
        self._unanswered: dict[str, dict[RequestId, Request]] = {}
        self._kv_tokens: Counter[RuntimeId] = Counter()
        self._needed_us: Counter[RuntimeId] = Counter()
        self._tokens_us: Counter[str] = Counter()
        self._ended: OrderedDict[RequestId, int] = OrderedDict()
        self.next_expiry = math.inf  # no queued request passes its time-out before

    # ------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request: RequestId) -> Request | None:
        return self._live.get(request)

    def is_over(self, request: RequestId, attempt: int) -> bool:
        return self._ended.get(request, 0) >= attempt

    def queued(self, model: str) -> Mapping[RequestId, Request]:
        return self._queues.get(model, _NOTHING)

    def queued_models(self) -> list[str]:
        return list(self._queues)

    def running(self, runtime: RuntimeId | None) -> Mapping[RequestId, Request]:
        return _NOTHING if runtime is None else self._running.get(runtime, _NOTHING)

    def runtimes(self) -> list[RuntimeId]:
        return list(self._running)

    def of_api(self, api: str) -> list[Request]:
        return list(self._by_api.get(api, _NOTHING).values())

    def unanswered(self, device: str) -> Mapping[RequestId, Request]:
        return self._unanswered.get(device, _NOTHING)

    def num_computing(self, device: Device) -> int:
        """Runtimes of the device with requests in flight: they share its time."""
        return sum(bool(self.running(runtime.head.id)) for runtime in device.residents.values())

    def kv_tokens(self, runtime: RuntimeId | None) -> int:
        """What the requests in flight there hold on average."""
        return 0 if runtime is None else self._kv_tokens[runtime]

    def needed_us(self, runtime: RuntimeId) -> int:
        """Prefill that is on its way there or being done."""
        return self._needed_us[runtime]

    def tokens_us(self, device: str) -> int:
        """The part of all that which tokens take, of all runtimes of the device."""
        return self._tokens_us[device]

    # ------------------------------------------------------------ changing

    def queue(self, request: Request) -> None:
        assert request.id not in self._live
        assert request.phase is Phase.QUEUED
        self._live[request.id] = request
        self._queues.setdefault(request.model, {})[request.id] = request
        self._index_api(request)
        self.next_expiry = min(self.next_expiry, request.waits_since + self._timeout_s)

    def grant(self, request: Request, runtime: RuntimeId, devices: tuple[str, ...], now: float) -> None:
        assert request.phase is Phase.QUEUED
        self._take(self._queues, request.model, request)
        self._fly(request, runtime, devices, Phase.GRANTED, now)

    def relearn(self, request: Request, runtime: RuntimeId, devices: tuple[str, ...], now: float) -> None:
        """One that an earlier router granted."""
        assert request.id not in self._live
        self._live[request.id] = request
        self._index_api(request)
        self._fly(request, runtime, devices, Phase.STARTED, now)

    def belongs(self, request: Request, api: str) -> None:
        """A request first told of by a runtime is claimed by its api_server."""
        if request.api != api:
            if request.api is not None:
                self._take(self._by_api, request.api, request)
            request.api = api
            self._index_api(request)

    def started(self, request: Request, now: float) -> None:
        if request.phase is Phase.GRANTED:
            request.phase, request.since = Phase.STARTED, now

    def first_token(self, request: Request, now: float) -> None:
        if request.phase in (Phase.GRANTED, Phase.STARTED):
            if not request.is_aside:
                self._answered(request)
            request.phase, request.since = Phase.ANSWERING, now

    def set_aside(self, runtime: RuntimeId) -> None:
        """It sleeps with what is in flight there: that fills nobody's window meanwhile."""
        for request in self.running(runtime).values():
            if request.phase is not Phase.ANSWERING and not request.is_aside:
                self._answered(request)
            request.is_aside = True

    def forget(self, request: Request) -> None:
        """It is over, or will be submitted again."""
        del self._live[request.id]
        if request.api is not None:
            self._take(self._by_api, request.api, request)
        if request.phase is Phase.QUEUED:
            self._take(self._queues, request.model, request)
        else:
            assert request.runtime is not None
            self._take(self._running, request.runtime, request)
            _subtract(self._kv_tokens, request.runtime, request.kv_tokens)
            if request.phase is not Phase.ANSWERING and not request.is_aside:
                self._answered(request)
        request.phase = Phase.OVER

    def remember_end(self, request: RequestId, attempt: int) -> None:
        """Answered, refused, lost or abandoned: this attempt does not come back."""
        self._ended[request] = max(attempt, self._ended.pop(request, 0))
        while len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    def expired(self, now: float) -> list[Request]:
        """Queued requests that have waited for the whole time-out. Looks at all, but only when one may be due."""
        if now < self.next_expiry:
            return []
        due: list[Request] = []
        self.next_expiry = math.inf
        for queue in self._queues.values():
            for request in queue.values():
                expiry = request.waits_since + self._timeout_s
                if expiry <= now:
                    due.append(request)
                else:
                    self.next_expiry = min(self.next_expiry, expiry)
        return due

    def _fly(
        self, request: Request, runtime: RuntimeId, devices: tuple[str, ...], phase: Phase, now: float
    ) -> None:
        request.runtime, request.devices, request.phase, request.since = runtime, devices, phase, now
        self._running.setdefault(runtime, {})[request.id] = request
        self._kv_tokens[runtime] += request.kv_tokens
        self._needed_us[runtime] += request.needed_us
        for device in devices:
            self._unanswered.setdefault(device, {})[request.id] = request
            self._tokens_us[device] += request.tokens_us

    def _answered(self, request: Request) -> None:
        assert request.runtime is not None
        _subtract(self._needed_us, request.runtime, request.needed_us)
        for device in request.devices:
            self._take(self._unanswered, device, request)
            _subtract(self._tokens_us, device, request.tokens_us)

    def _index_api(self, request: Request) -> None:
        if request.api is not None:
            self._by_api.setdefault(request.api, {})[request.id] = request

    @staticmethod
    def _take(index: dict[K, dict[RequestId, Request]], key: K, request: Request) -> None:
        bucket = index[key]
        del bucket[request.id]
        if not bucket:
            del index[key]  # no empty buckets: they would outlive runtimes and api_servers

    def check(self) -> None:
        queued = {i for queue in self._queues.values() for i in queue}
        flying = {i for running in self._running.values() for i in running}
        assert not queued & flying
        assert queued | flying == set(self._live)
        assert len(queued) + len(flying) == sum(map(len, (*self._queues.values(), *self._running.values())))
        waiting = {i for bucket in self._unanswered.values() for i in bucket}
        for number, request in self._live.items():
            assert request.id == number
            assert 1 <= request.attempt <= 2
            assert (request.phase is Phase.QUEUED) == (number in queued)
            has_window = request.phase in (Phase.GRANTED, Phase.STARTED) and not request.is_aside
            assert (number in waiting) == has_window
            assert request.api is None or number in self._by_api[request.api]
        flying_requests = [request for running in self._running.values() for request in running.values()]
        unanswered = [request for request in flying_requests if request.id in waiting]
        assert self._kv_tokens == _sums((r.runtime, r.kv_tokens) for r in flying_requests)
        assert self._needed_us == _sums((r.runtime, r.needed_us) for r in unanswered)
        assert self._tokens_us == _sums((d, r.tokens_us) for r in unanswered for d in r.devices)
        indexes = (self._queues, self._running, self._by_api, self._unanswered)
        assert all(bucket for index in indexes for bucket in index.values()), "no empty buckets"


def _subtract(sums: Counter[K], key: K, amount: int) -> None:
    sums[key] -= amount
    if not sums[key]:
        del sums[key]


def _sums(amounts: Iterable[tuple[str | None, int]]) -> Counter[str | None]:
    sums: Counter[str | None] = Counter()
    for key, amount in amounts:
        sums[key] += amount
    return +sums
