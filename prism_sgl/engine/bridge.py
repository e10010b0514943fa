"""An ASGI app behind ZeroMQ: what an HTTP server is to others, this is to the app of one runtime.

api_servers send Forward and get Head and Chunks back, straight to the one that asked. Flow is by credit: when
an api_server has not returned any, the app's ``send`` waits, so a client that reads slowly stops its own answer
and nothing else, and at most ``Forward.credit`` chunks of it exist outside the app.
"""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

import zmq

from prism_sgl import addresses, messages
from prism_sgl.engine.asgi_exchange import AsgiApp, Exchange
from prism_sgl.engine.deadlines import promise
from prism_sgl.frame_socket import FrameSocket
from prism_sgl.messages import (
    Broke,
    Cancel,
    Chunk,
    Credit,
    Finished,
    FirstToken,
    Forward,
    Head,
    Ping,
    Pong,
    RequestKey,
    RuntimeId,
    RuntimeToApi,
    Started,
)

log = logging.getLogger(__name__)

# SGLang aborts a request 2 s after its client has gone; an app that has not ended by then is cancelled.
_CANCEL_GRACE_S = 5.0
# api_servers ping every 2 s while we answer for them; one that is silent so long has no clients any more.
_PEER_SILENT_S = 15.0
_LOOK_EVERY_S = 2.0
_REMEMBERED = 10_000
_USAGE = re.compile(rb'"(prompt_tokens|cached_tokens|completion_tokens)"\s*:\s*(\d{1,12})')


class AsgiBridge:
    """Owner of the requests at the app. All of it happens on the loop in which it was started.

    A key (request, attempt) runs at most once: a Forward of one that runs or ran is dropped. A request is over
    when its last chunk is out, though its app task may live on (SGLang's stays for 2 s); a cancelled one is
    over when its task has ended, because only then has the engine let go of it.
    """

    def __init__(
        self,
        app: AsgiApp,
        runtime: RuntimeId,
        run_dir: str,
        on_event: Callable[[Started | FirstToken | Finished], None],
    ) -> None:
        self.undecodable = 0
        self.repeated = 0
        self.undeliverable = 0
        self._prefilled = 0  # first tokens, by the engine's count
        self._told_early: set[RequestKey] = set()  # by the first byte, before the engine counted them
        self.awake = True  # set False before the engine sleeps: then nothing that needs a forward is let in
        self._app = app
        self._runtime = runtime
        self._address = addresses.runtime_requests(run_dir, runtime)
        self._on_event = on_event
        self._running: dict[RequestKey, Exchange] = {}
        self._over: OrderedDict[RequestKey, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heard_at: dict[bytes, float] = {}
        self._looked_at = 0.0
        self._stopped = True

    @property
    def running(self) -> list[RequestKey]:
        """Generations that are being answered."""
        return [key for key, exchange in self._running.items() if exchange.counted]

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = FrameSocket(self._context, zmq.ROUTER, self._take)
        self._socket.bind(self._address)
        self._stopped = False
        self._look()

    async def stop(self) -> None:
        """Ends every request; the app's tasks are cancelled and awaited."""
        if self._stopped:
            return
        self._stopped = True
        self._timer.cancel()
        for exchange in self._running.values():
            exchange.gone = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # ------------------------------------------------------------ from api_servers

    def _take(self, frames: list[bytes]) -> None:
        peer, *rest = frames
        self._heard_at[peer] = self.loop.time()
        try:
            message = messages.decode_api_to_runtime(rest[0])
            if isinstance(message, Forward) != (len(rest) == 2):
                raise messages.DECODE_ERRORS[0]("a Forward has two frames, others one")
        except (*messages.DECODE_ERRORS, IndexError):
            self.undecodable += 1
            if self.undecodable == 1:
                log.warning("dropped a frame that does not decode; more are only counted")
            return
        match message:
            case Forward():
                self._forward(peer, message, rest[1])
            case Credit(request=request, attempt=attempt, chunks=chunks):
                if exchange := self._running.get(RequestKey(request, attempt)):
                    exchange.refill(chunks)
            case Cancel(request=request, attempt=attempt):
                if exchange := self._running.get(RequestKey(request, attempt)):
                    self._cancel(exchange)
            case Ping():
                running = [key for key, exchange in self._running.items() if exchange.peer == peer]
                self._send(peer, Pong(runtime=self._runtime, running=running))

    def _forward(self, peer: bytes, forward: Forward, body: bytes) -> None:
        exchange = Exchange(self, peer, forward, body)
        if exchange.key in self._running or exchange.key in self._over:
            self.repeated += 1
            return
        self._running[exchange.key] = exchange
        if forward.counted and not self.awake:
            self._break(exchange, "the model is asleep")
            return
        task = self.loop.create_task(self._serve(exchange, forward))
        # After the app's first step, which is what the client waits for.
        self.loop.call_soon(self._tell_started, exchange)
        exchange.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cancel(self, exchange: Exchange) -> None:
        if exchange.gone:
            return
        exchange.gone = True
        exchange.disconnect()
        if exchange.task is not None:
            self.loop.call_later(_CANCEL_GRACE_S, exchange.task.cancel)

    def _look(self) -> None:
        """Cancel the requests of api_servers that have died without a word."""
        now = self.loop.time()
        if now - self._looked_at > 2 * _LOOK_EVERY_S:
            # The loop stood still, and uvloop runs timers before it reads: what peers sent lies unread.
            self._heard_at = dict.fromkeys(self._heard_at, now)
        self._looked_at = now
        alive = {exchange.peer for exchange in self._running.values()}
        for peer in [peer for peer in self._heard_at if peer not in alive]:
            del self._heard_at[peer]
        for exchange in list(self._running.values()):
            if now - self._heard_at.get(exchange.peer, now) > _PEER_SILENT_S:
                self._cancel(exchange)
        self._timer = self.loop.call_later(_LOOK_EVERY_S, self._look)

    # ------------------------------------------------------------ the app

    async def _serve(self, exchange: Exchange, forward: Forward) -> None:
        try:
            with promise(forward.due):
                await self._app(_scope(forward), exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # Only this bridge cancels: after the grace, or because it stops.
            self._give_up(exchange, "the runtime stops")
        except Exception as error:
            # Not its text: that may hold the prompt.
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            log.error("%s: the app raised %s\n%s", exchange.path, type(error).__name__, where)
            self._give_up(exchange, f"the app raised {type(error).__name__}")
        else:
            self._give_up(exchange, "the app ended without an answer")

    def _give_up(self, exchange: Exchange, why: str) -> None:
        if exchange.gone:
            self.end(exchange, "cancelled")
        elif not exchange.complete:
            self._break(exchange, why)

    def _break(self, exchange: Exchange, why: str) -> None:
        request, attempt = exchange.key.request, exchange.key.attempt
        broke = Broke(request=request, attempt=attempt, started=exchange.answering, message=why)
        self._send(exchange.peer, broke)
        self.end(exchange, "error")

    def _tell_started(self, exchange: Exchange) -> None:
        if not exchange.started_told:
            exchange.started_told = True
            self._report(exchange, Started)

    def prefilled(self, total: int) -> None:
        """The engine says how many requests have had their first token since it began.

        It does not say which: they come in order of arrival, near enough for a window that only counts them.
        """
        untold = (each for each in self._running.values() if each.counted and not each.first_told)
        for _ in range(total - self._prefilled):
            if self._told_early:
                self._told_early.pop()
            elif exchange := next(untold, None):
                self._tell_first(exchange)
            # Else cancelled in between, or several prompts in one request: nobody is left to tell of them.
        self._prefilled = total

    def first_byte(self, exchange: Exchange) -> None:
        if not exchange.first_told and exchange.status < 400:
            if exchange.counted:
                self._told_early.add(exchange.key)
            self._tell_first(exchange)

    def _tell_first(self, exchange: Exchange) -> None:
        exchange.first_told = True
        self._tell_started(exchange)
        self._report(exchange, FirstToken, ttft_s=self.loop.time() - exchange.began)

    def end(self, exchange: Exchange, outcome: str) -> None:
        if self._running.pop(exchange.key, None) is None:
            return
        exchange.complete = True
        # An error with status 200 and an embedding have no prefill that the engine would ever count.
        self._told_early.discard(exchange.key)
        self._over[exchange.key] = None
        if len(self._over) > _REMEMBERED:
            self._over.popitem(last=False)
        exchange.disconnect()
        self._tell_started(exchange)
        usage = {name.decode(): int(number) for name, number in _USAGE.findall(exchange.tail)}
        self._report(
            exchange,
            Finished,
            outcome=outcome,
            status=exchange.status,
            total_s=self.loop.time() - exchange.began,
            **usage,
        )

    def _report(
        self,
        exchange: Exchange,
        kind: type[Started] | type[FirstToken] | type[Finished],
        **fields: Any,
    ) -> None:
        if exchange.counted:
            key = exchange.key
            self._on_event(kind(runtime=self._runtime, request=key.request, attempt=key.attempt, **fields))

    # ------------------------------------------------------------ to api_servers

    def reply(self, exchange: Exchange, message: Head | Chunk, body: bytes | None = None) -> None:
        if not self._send(exchange.peer, message, body):
            self._cancel(exchange)

    def _send(self, peer: bytes, message: RuntimeToApi, body: bytes | None = None) -> bool:
        if self._stopped:
            return False
        frames: Sequence[bytes] = (peer, messages.encode(message))
        sent = self._socket.send(frames if body is None else (*frames, body))
        self.undeliverable += not sent
        return sent


def _scope(forward: Forward) -> MutableMapping[str, Any]:
    return {
        "type": "http",
        # From 2.4 on starlette no longer listens for a disconnect while it streams.
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": forward.method,
        "scheme": "http",
        "root_path": "",
        "client": None,
        "server": None,
        "raw_path": forward.path.encode(),
        "path": unquote(forward.path),
        "query_string": forward.query,
        "headers": forward.headers,
        "state": {},
    }
