"""The queue side: what api_servers ask, and what runtimes tell of requests."""

from __future__ import annotations

import math

from prism_sgl.config import Config
from prism_sgl.messages import (
    Abandon,
    ApiHello,
    Finished,
    FirstToken,
    Introduce,
    Lost,
    Refuse,
    RequestKey,
    RuntimeId,
    Started,
    Submit,
)
from prism_sgl.schedulers.dispatch import TIERS
from prism_sgl.schedulers.events import Outbox
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.grants import Granter
from prism_sgl.schedulers.records import FAILED, Model, Phase, Request, Runtime
from prism_sgl.schedulers.request_table import RequestTable

# api_servers beat once a second; half a minute is longer than any pause of a machine that is not lost.
_API_SILENT_S = 30.0
_ASK_AGAIN_S = 1.0
_REPEAT_GRANT_S = 10.0
# A runtime says that nothing is in flight: requests that started longer ago than this are over.
_RECONCILE_S = 10.0
_MOST_STRANGERS = 1024
# A model that failed is tried again by a new request after this (supervisor.py).
RETRY_FAILED_S = 60.0


class RequestDesk:
    """Owner of what is known of api_servers; moves requests through the table."""

    def __init__(
        self, config: Config, epoch: int, fleet: Fleet, table: RequestTable, granter: Granter, out: Outbox
    ) -> None:
        self._max_queue = config.server.max_queue
        self._timeout_s = config.server.activation_timeout_s
        self._epoch = epoch
        self._fleet = fleet
        self._table = table
        self._granter = granter
        self._out = out
        self._heard_at: dict[str, float] = {}  # api_servers that have said hello
        self._introduced_at: dict[str, float] = {}

    # ------------------------------------------------------------ api_servers

    def knows(self, api: str, now: float) -> bool:
        """False, and an Introduce, for one that has not said hello: it may hold grants of an earlier router, so
        nothing that it submits may run before it has told of them. It submits again after its hello."""
        if api in self._heard_at:
            self._heard_at[api] = now
            return True
        if now - self._introduced_at.get(api, -_ASK_AGAIN_S) >= _ASK_AGAIN_S:
            if len(self._introduced_at) >= _MOST_STRANGERS:
                self._introduced_at.clear()
            self._introduced_at[api] = now
            self._out.api(api, Introduce(epoch=self._epoch))
        return False

    @property
    def apis(self) -> list[str]:
        return list(self._heard_at)

    def hello(self, api: str, message: ApiHello, now: float, *, supervisor_known: bool) -> None:
        """Its grants count as in flight. What it has queued here it will submit again, so that is forgotten: a
        new api_server of the same name no longer has it."""
        self._heard_at[api] = now
        self._introduced_at.pop(api, None)
        for request in self._table.of_api(api):
            if request.phase is Phase.QUEUED:
                self._table.forget(request)
                self._fleet.touch(self._fleet.models[request.model])
        for key, runtime in message.granted:
            self._relearn(api, key, runtime, now, supervisor_known)

    def _relearn(
        self, api: str, key: RequestKey, runtime: RuntimeId, now: float, supervisor_known: bool
    ) -> None:
        if self._table.is_over(key.request, key.attempt):
            return
        if (request := self._table.get(key.request)) is not None:
            if request.attempt == key.attempt and request.runtime == runtime:
                self._table.belongs(request, api)
                self._table.started(request, now)
            return
        gone = supervisor_known and self._fleet.by_id(runtime) is None
        if gone or self._fleet.has_exited(runtime) or not self.adopt(key, runtime, api, now):
            self._table.remember_end(key.request, key.attempt)
            reason = f"{runtime} is gone"
            self._out.api(api, Lost(request=key.request, attempt=key.attempt, reason=reason))

    def adopt(self, key: RequestKey, runtime: RuntimeId, api: str | None, now: float) -> bool:
        """Count a request as in flight that an earlier router granted."""
        if (place := self._fleet.parse(runtime)) is None:
            return False
        model, device = place
        request = Request(
            id=key.request,
            api=api,
            attempt=min(2, max(1, key.attempt)),
            model=model.name,
            prompt_tokens=0,
            max_new_tokens=0,
            priority=0,
            arrival=now,
            deadline=now,
            queued_at=now,
            needed_us=1,  # nobody knows how much, but it may be prefilled still
        )
        devices = (device.name, *(sibling.devices[0] for sibling in model.siblings))
        self._table.relearn(request, runtime, devices, now)
        self._fleet.touch(model)
        return True

    def forget_silent(self, now: float) -> list[str]:
        """api_servers that have died: their requests have no client any more."""
        # Not remembered as over: one that was only slow tells of them again in its next hello.
        silent = [api for api, heard_at in self._heard_at.items() if now - heard_at > _API_SILENT_S]
        for api in silent:
            del self._heard_at[api]
            requests = self._table.of_api(api)
            for request in requests:
                self._over(request, now, remember=False)
            self._fleet.note(f"api_server {api} is silent; its {len(requests)} requests are forgotten")
        return silent

    # ------------------------------------------------------------ a request's way

    def submit(self, api: str, message: Submit, now: float) -> None:
        if self._table.is_over(message.request, message.attempt):
            return
        model = self._fleet.models.get(message.model)
        if model is None:
            text = f"no model {message.model}; GET /v1/models lists those there are"
            self._table.remember_end(message.request, message.attempt)
            self._out.api(api, _refusal(message, 404, "model_not_found", text))
            return
        old = self._table.get(message.request)
        if old is not None:
            if old.attempt >= message.attempt:
                return
            self._over(old, now)  # it has given up on the first attempt
        if message.attempt not in (1, 2):
            text = "a request is tried at most twice"
            self._out.api(api, _refusal(message, 503, "too_many_attempts", text))
            return
        if (refusal := self._refusal(model, message, now)) is not None:
            self._table.remember_end(message.request, message.attempt)
            self._out.api(api, refusal)
            return
        if message.attempt == 1:
            model.load.ask(message.prompt_tokens, now)
        arrival = now - max(0.0, message.waited_s)
        tier = TIERS.get(message.service_tier, TIERS["default"])
        ttft_s = message.ttft_s if message.ttft_s is not None else model.config.slo.ttft_s * tier.ttft_factor
        self._table.queue(
            Request(
                id=message.request,
                api=api,
                attempt=message.attempt,
                model=model.name,
                prompt_tokens=message.prompt_tokens,
                max_new_tokens=message.max_new_tokens,
                priority=message.priority + tier.priority + model.config.priority,
                arrival=arrival,
                deadline=arrival + ttft_s,
                queued_at=now,
                kv_tokens=_kv_tokens(model, message),
            )
        )
        self._fleet.touch(model)
        self._granter.changed(model)

    def _refusal(self, model: Model, message: Submit, now: float) -> Refuse | None:
        for part in model.parts:
            runtime = part.runtime
            if runtime.state is FAILED and part.failure and now - runtime.since < RETRY_FAILED_S:
                retry_s = min(part.retry_at, runtime.since + RETRY_FAILED_S) - now
                text = f"{part.name} failed to load: {part.failure}"
                return _refusal(message, 503, "model_failed", text, max(1.0, retry_s))
        queue = self._table.queued(model.name)
        if len(queue) >= self._max_queue and message.attempt == 1:
            text = f"{len(queue)} requests wait for {model.name} already; try again later"
            drain_s = len(queue) * model.latency.estimate_s(message.prompt_tokens)
            return _refusal(message, 429, "queue_full", text, min(60.0, max(1.0, drain_s)))
        return None

    def abandon(self, message: Abandon, now: float) -> None:
        if (request := self._table.get(message.request)) is not None:
            self._over(request, now)
        self._table.remember_end(message.request, 2)  # whatever attempt is still on its way

    def started(self, message: Started, now: float) -> None:
        if (request := self._find(message)) is not None:
            self._table.started(request, now)

    def first_token(self, message: FirstToken, now: float) -> None:
        request = self._find(message)
        if request is None or request.phase is Phase.ANSWERING:
            return
        request.ttft_s = message.ttft_s
        if request.prompt_tokens > 0 and not request.is_aside:
            latency = self._fleet.models[request.model].latency
            # The engine worked on those before it meanwhile; of all that time it is charged its own share.
            total_us = request.needed_us + request.ahead_us
            request.prefill_s = message.ttft_s * (request.needed_us / total_us if request.ahead_us else 1.0)
            if latency.is_new:
                self._learn_prefill(request, latency.uncached_tokens(request.prompt_tokens))
        self._table.first_token(request, now)
        self._granter.freed(*request.devices)

    def finished(self, message: Finished, now: float) -> None:
        request = self._find(message)
        if request is None:
            # The api_server may not have seen the end yet, and name it in its hello.
            self._table.remember_end(message.request, message.attempt)
            return
        model = self._fleet.models[request.model]
        model.rate.add(message.completion_tokens, now)
        if message.outcome == "ok" and message.completion_tokens > 0:
            model.answers.observe(message.completion_tokens)
            self._learn_load(request, message)
        tokens = model.latency.uncached_tokens(request.prompt_tokens)
        if message.prompt_tokens > 0:
            model.latency.observe_hits(message.prompt_tokens, message.cached_tokens)
            tokens = float(max(1, message.prompt_tokens - message.cached_tokens))
        self._learn_prefill(request, tokens)
        self._over(request, now)

    def _learn_prefill(self, request: Request, computed_tokens: float) -> None:
        """Once a request. Its end knows best how many tokens were computed, but may be long in coming."""
        if (prefill_s := request.prefill_s) is not None:
            request.prefill_s = None
            self._fleet.models[request.model].latency.observe(computed_tokens, prefill_s)

    def _learn_load(self, request: Request, message: Finished) -> None:
        devices = [self._fleet.devices[name] for name in request.devices]
        if not devices or request.prompt_tokens <= 0 or request.is_aside:
            return  # when it began is not known (an earlier router granted it), or it was set aside
        self._fleet.models[request.model].load.answered(
            message.total_s,
            request.ttft_s,
            (message.prompt_tokens or request.prompt_tokens) + message.completion_tokens,
            message.completion_tokens,
            max(map(self._table.num_computing, devices)),
        )

    def _find(self, message: Started | FirstToken | Finished) -> Request | None:
        request = self._table.get(message.request)
        if request is None or request.attempt != message.attempt or request.runtime != message.runtime:
            return None  # late, or about a request that was abandoned
        return request

    def _over(self, request: Request, now: float, *, remember: bool = True) -> None:
        model = self._fleet.models[request.model]
        self._table.forget(request)
        if remember:
            self._table.remember_end(request.id, request.attempt)
        self._granter.freed(*request.devices)
        runtime = self._fleet.by_id(request.runtime)
        if runtime is not None and not self._table.running(runtime.id):
            runtime.idle_since = now
        self._fleet.touch(model)

    # ------------------------------------------------------------ ends that are no answers

    def refuse_all(self, model: Model, code: str, text: str, retry_after_s: float, now: float) -> None:
        for request in list(self._table.queued(model.name).values()):
            self._refuse(request, code, text, retry_after_s, now)

    def _refuse(self, request: Request, code: str, text: str, retry_after_s: float, now: float) -> None:
        self._out.api(
            request.api,
            Refuse(request=request.id, status=503, code=code, message=text, retry_after_s=retry_after_s),
        )
        self._over(request, now)

    def lose(self, runtime: RuntimeId, reason: str, now: float) -> None:
        """Its process is gone, and with it the requests that were in flight there."""
        for request in list(self._table.running(runtime).values()):
            self._out.api(request.api, Lost(request=request.id, attempt=request.attempt, reason=reason))
            # One that no api_server has claimed yet will be, by a hello that this answers then.
            self._over(request, now, remember=request.api is not None)

    def lose_unlisted(self, now: float) -> None:
        """The supervisor has listed all runtimes: grants on others were lost with them."""
        for runtime in self._table.runtimes():
            if self._fleet.by_id(runtime) is None:
                self.lose(runtime, f"{runtime} is gone", now)

    def reconcile(self, runtime: Runtime, now: float) -> None:
        """The runtime says that it has nothing in flight. A Finished that a dying router took with it is made up
        for here; younger requests may be on their way from the api_server."""
        for request in list(self._table.running(runtime.id).values()):
            if request.phase is not Phase.GRANTED and now - request.since > _RECONCILE_S:
                self._over(request, now)

    def sweep(self, now: float) -> None:
        for request in self._table.expired(now):
            model = self._fleet.models[request.model]
            waited_s = now - request.waits_since
            text = f"{model.name} had no room for this request in {waited_s:.0f} s ({model.runtime.state})"
            self._refuse(request, "activation_timeout", text, 10.0, now)
        self._granter.repeat_unstarted(now, _REPEAT_GRANT_S)


def _kv_tokens(model: Model, message: Submit) -> int:
    """What it will hold on average while it is answered; never more than the engine would let it have.

    What the prefix cache has is held once for all who share it, so it is not counted for each.
    """
    prompt = math.ceil(model.latency.uncached_tokens(message.prompt_tokens))
    tokens = prompt + model.answers.expect(message.max_new_tokens) // 2
    return tokens if model.facts is None else min(tokens, model.facts.max_request_tokens)


def _refusal(
    message: Submit, status: int, code: str, text: str, retry_after_s: float | None = None
) -> Refuse:
    return Refuse(
        request=message.request, status=status, code=code, message=text, retry_after_s=retry_after_s
    )
