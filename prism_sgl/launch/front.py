"""The ASGI app of the api_server: finds the route and the model, then answers itself or relays a runtime."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from prism_sgl.config import Config
from prism_sgl.launch.answers import LIVING, Answers
from prism_sgl.launch.call import Call, Gate, Headers, Receive, Send, answer, read_body, returned_headers
from prism_sgl.launch.errors_http import HttpError, unknown_model
from prism_sgl.launch.exchange import Exchange
from prism_sgl.launch.forwarding import Forwarder
from prism_sgl.launch.metrics import Metrics
from prism_sgl.launch.peek import Peek, TokenEstimate, Wish, peek_form, peek_json, wish
from prism_sgl.launch.routes import Kind, Route, find
from prism_sgl.messages import RuntimeId, RuntimeState

log = logging.getLogger(__name__)

_MODEL_PREFIX = "/m/"
_LONGEST_NAME = 1024  # a path of nothing but slashes is not tried at each of them
_INFO_TIMEOUT_S = 120.0
_CANCELLED = "cancelled"
_READABLE: Headers = [(b"access-control-allow-origin", b"*")]
_CORS: Headers = [
    *_READABLE,
    (b"access-control-allow-methods", b"GET, POST, PUT"),
    (b"access-control-max-age", b"600"),
]


class Front:
    def __init__(self, config: Config, forwarder: Forwarder, answers: Answers, metrics: Metrics) -> None:
        self._max_body_bytes = config.server.max_body_bytes
        self._gate = Gate(config.server)
        self._forwarder = forwarder
        self._answers = answers
        self._metrics = metrics
        self._estimates = {name: TokenEstimate() for name in config.models}

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a connection of type {scope['type']} is not served")
        began = time.monotonic()
        call = Call(scope)
        request_id = call.request_id() or self._forwarder.new_id().encode()
        ours: Headers = [(b"x-request-id", request_id)]
        # What we answer ourselves. SGLang's answers have it already, and browsers refuse it twice.
        cors = _READABLE if b"origin" in call.headers and call.method != "OPTIONS" else []
        model = endpoint = ""
        code = _CANCELLED
        self._metrics.begun()
        try:
            self._strip_model(call)
            model = call.model or ""
            if call.method == "OPTIONS":
                code = await _preflight(call, send)
                return
            route, call.params = find(call.method, call.path)
            endpoint = route.path
            if route.kind is Kind.ADMIN:
                cors = []
            self._gate.check(call, route)
            kind = route.under_model if call.model is not None and route.under_model else route.kind
            if kind is Kind.REFUSED:
                raise HttpError(403, "refused", f"{call.path} is refused: {route.reason}")
            if kind is Kind.OURS or (kind is Kind.ADMIN and _is_ours(route)):
                reply = await self._answers.answer(route, call)
                headers = [*ours, *cors]
                await answer(send, reply.status, reply.body, content_type=reply.content_type, headers=headers)
                code = str(reply.status)
                return
            exchange = await self._open(call, route, kind, receive)
            model = exchange.model
            code = await self._relay(exchange, receive, send, ours, began)
        except HttpError as error:
            code = str(error.status)
            if error.status >= 500:
                log.warning("%s %s: %s", request_id.decode(), endpoint or call.path[:200], error.message)
            await answer(send, error.status, error.body(), headers=[*error.headers(), *ours, *cors])
        except ConnectionResetError:
            pass  # the client went away while it sent
        except Exception:
            code = "500"
            raise
        finally:
            self._metrics.ended(model, endpoint, code)

    def _strip_model(self, call: Call) -> None:
        """``/m/<model>/<path>`` is a base URL. Names may have slashes, so the longest name that fits is taken."""
        if not call.path.startswith(_MODEL_PREFIX):
            return
        rest = call.path.removeprefix(_MODEL_PREFIX)
        end = min(len(rest), _LONGEST_NAME)
        while end > 0:
            try:
                call.model = self._answers.resolve(rest[:end])
            except HttpError:
                end = rest.rfind("/", 0, end)
            else:
                call.path = rest[end:] or "/"
                return
        raise unknown_model(rest.partition("/")[0][:200])

    # ------------------------------------------------------------ towards a runtime

    async def _open(self, call: Call, route: Route, kind: Kind, receive: Receive) -> Exchange:
        """Read the body, find the model, and submit or forward."""
        body = await read_body(call, receive, self._max_body_bytes)
        generates = kind is Kind.PASS
        peek = _peek(call, route, body, must_be_json=generates)
        given = call.model if call.model is not None else peek.model or call.query_value("model")
        model = self._answers.model_or_only(given, where='in the body as "model"')
        exchange = Exchange(
            self._forwarder.new_id(),
            model,
            method=call.method,
            path=quote(call.path),
            query=call.query,
            headers=call.forwarded_headers(len(body)),
            body=body,
            wish=wish(peek, call.headers) if generates else Wish(),
            prompt_tokens=self._estimates[model].tokens(len(body)),
            counted=generates,
        )
        if generates:
            self._forwarder.submit(exchange)
        else:
            self._forwarder.forward(exchange, self._living_runtime(model, route))
        return exchange

    def _living_runtime(self, model: str, route: Route) -> RuntimeId:
        status = self._answers.status_of(model)
        if status is None or status.runtime is None or status.state not in LIVING:
            state = status.state if status is not None else "unknown yet"
            raise HttpError(
                503,
                "not_loaded",
                f"{model} is {state}; POST /api/v1/models/{model}/load starts it, and so does a generation",
                retry_after_s=5.0,
            )
        if route.path == "/flush_cache" and status.state is RuntimeState.ASLEEP:
            raise HttpError(409, "asleep", f"{model} sleeps, so nothing of it is cached")
        return status.runtime

    async def _relay(
        self, exchange: Exchange, receive: Receive, send: Send, ours: Headers, began: float
    ) -> str:
        """Write what comes to the client; returns the code for metrics. Raises HttpError before the first byte."""
        loop = asyncio.get_running_loop()
        # After the body, an HTTP server's receive returns when the client has gone.
        gone = loop.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: exchange.wake())
        timer = None
        if not exchange.counted:
            late = HttpError(504, "timeout", f"{exchange.model} gave no answer in {_INFO_TIMEOUT_S:.0f} s")
            timer = loop.call_later(_INFO_TIMEOUT_S, exchange.fail, late)
        ttft_s: float | None = None
        try:
            while True:
                if not gone.done():
                    await exchange.news()
                if gone.done():
                    return _CANCELLED
                if exchange.failure is not None and (not exchange.sent or not exchange.chunks):
                    return await _break_off(exchange, exchange.failure, send)
                chunks, exchange.chunks = exchange.chunks, []
                if not chunks:
                    continue
                last = exchange.complete
                body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
                if not exchange.sent:
                    exchange.sent = True
                    if timer is not None:
                        timer.cancel()
                    ttft_s = time.monotonic() - began
                    await send(_start(exchange, ours))
                await send({"type": "http.response.body", "body": body, "more_body": not last})
                if last:
                    self._estimates[exchange.model].learn(len(exchange.body), body)
                    return _status(exchange)
                self._forwarder.taken(exchange, len(chunks))
        finally:
            gone.cancel()
            if timer is not None:
                timer.cancel()
            self._forwarder.drop(exchange)
            if exchange.counted:
                duration_s = time.monotonic() - began
                self._metrics.answered(
                    exchange.model, ttft_s=ttft_s, queue_s=exchange.waited_s, duration_s=duration_s
                )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_ours(route: Route) -> bool:
    return route.path in ("/sleep", "/wake_up") or route.path.startswith("/api/")


def _peek(call: Call, route: Route, body: bytes, *, must_be_json: bool) -> Peek:
    content_type = call.headers.get(b"content-type", b"")
    if content_type.startswith(b"multipart/form-data"):
        return peek_form(body)
    if must_be_json:
        return peek_json(body)
    if not body:
        return Peek()
    try:
        return peek_json(body)
    except HttpError:
        return Peek()  # not ours to judge: the engine knows what this route takes


def _start(exchange: Exchange, ours: Headers) -> dict[str, Any]:
    assert exchange.head is not None
    headers = returned_headers(exchange.head.headers)
    headers += ours
    if exchange.counted:
        headers += (
            (b"x-prism-queue-ms", b"%.1f" % (exchange.queued_s * 1000.0)),
            (b"x-prism-activation-ms", b"%.1f" % (exchange.activation_s * 1000.0)),
            (b"x-prism-model-state", b"activated" if exchange.activation_s > 0.0 else b"warm"),
        )
    return {"type": "http.response.start", "status": exchange.head.status, "headers": headers}


def _status(exchange: Exchange) -> str:
    assert exchange.head is not None
    return str(exchange.head.status)


async def _break_off(exchange: Exchange, failure: HttpError, send: Send) -> str:
    """An error instead of the answer; after the first byte an error event, or an answer that visibly ends early."""
    if not exchange.sent:
        raise failure
    log.warning("%s: %s", exchange.id, failure.message)
    assert exchange.head is not None
    content_type = dict(exchange.head.headers).get(b"content-type", b"")
    if content_type.startswith(b"text/event-stream"):
        await send({"type": "http.response.body", "body": failure.event(), "more_body": False})
    # Else: to return before the last chunk makes the HTTP server close the connection.
    return str(failure.status)


async def _preflight(call: Call, send: Send) -> str:
    """For pages in browsers, as SGLang allows them; operators' routes are not for pages."""
    method = call.headers.get(b"access-control-request-method", b"POST").decode(errors="replace")
    route, _ = find(method, call.path)
    if route.kind in (Kind.ADMIN, Kind.REFUSED):
        raise HttpError(403, "admin_only", f"{call.path} is not for pages in browsers")
    # Those that were asked for, by name: browsers do not count Authorization as a part of "*".
    asked = call.headers.get(b"access-control-request-headers", b"authorization, *")
    await answer(send, 200, b"", headers=[*_CORS, (b"access-control-allow-headers", asked)])
    return "200"
