"""The api_server's sockets: one to the router, one to each runtime that it talks to.

Submit -> (held) -> Grant -> Forward with the body -> Head and Chunks. Bodies and answers never go through the
router. After a router restart all that is not granted is submitted again; runtimes drop what they have seen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from prism_sgl import addresses
from prism_sgl.frame_socket import FrameSocket
from prism_sgl.launch.errors_http import HttpError
from prism_sgl.launch.exchange import WINDOW_CHUNKS, Exchange
from prism_sgl.messages import (
    DECODE_ERRORS,
    Abandon,
    AdminReply,
    ApiBeat,
    ApiHello,
    AskAdmin,
    Broke,
    Cancel,
    Chunk,
    Credit,
    Grant,
    Head,
    Introduce,
    Lost,
    Message,
    Ping,
    Pong,
    Refuse,
    RequestId,
    RequestKey,
    RuntimeId,
    Status,
    decode_router_to_api,
    decode_runtime_to_api,
    encode,
)

log = logging.getLogger(__name__)

_BEAT_S = 0.5
_PING_EVERY_BEATS = 4
_CREDIT_STEP = WINDOW_CHUNKS // 2
_ROUTER_SILENT_S = 3.0
_ROUTER_LEARNS_S = 3.0  # a new one asks the supervisor once a second what is alive
_NO_CONNECTION_RETRY_S = 5.0


@dataclass
class _Link:
    """The socket to one runtime, and what is under way there."""

    socket: FrameSocket
    epoch: int = 0  # of the last router that named this runtime
    exchanges: dict[RequestId, Exchange] = field(default_factory=dict)
    pinged: list[RequestKey] = field(
        default_factory=list
    )  # forwarded before the ping that is not answered yet


class Forwarder:
    """Owner of all exchanges of this api_server, and of what the router last told.

    An exchange is in ``_exchanges`` until it is complete, failed or dropped, and in the table of its link
    from its forward on.
    """

    def __init__(self, api: str, run_dir: str, *, on_status: Callable[[Status], None]) -> None:
        self.api = api
        self.undecodable = 0
        self.retried = 0
        self.status: Status | None = None
        self._status_at = 0.0
        self._epoch_since = 0.0
        self._run_dir = run_dir
        self._on_status = on_status
        self._exchanges: dict[RequestId, Exchange] = {}
        self._links: dict[RuntimeId, _Link] = {}
        self._asks: dict[str, tuple[AskAdmin, asyncio.Future[AdminReply]]] = {}
        self._num_ids = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._router = FrameSocket(self._context, zmq.DEALER, self._from_router, identity=self.api.encode())
        self._router.connect(addresses.router_for_apis(self._run_dir))
        self._tell(ApiHello(api=self.api))
        self._num_beats = 0
        self._beat_timer = self._loop.call_later(_BEAT_S, self._beat)

    def stop(self) -> None:
        self._beat_timer.cancel()
        for exchange in list(self._exchanges.values()):
            self.drop(exchange)
        for link in self._links.values():
            link.socket.close()
        self._router.close()
        self._context.term()

    @property
    def router_lives(self) -> bool:
        return self.status is not None and time.monotonic() - self._status_at < _ROUTER_SILENT_S

    def new_id(self) -> RequestId:
        """Ours, not the client's: two clients may send the same."""
        self._num_ids += 1
        return RequestId(f"{self.api}-{self._num_ids:x}")

    # ------------------------------------------------------------ for the front

    def submit(self, exchange: Exchange) -> None:
        self._exchanges[exchange.id] = exchange
        self._tell(exchange.submit())

    def forward(self, exchange: Exchange, runtime: RuntimeId) -> None:
        """Send it off. The front calls this only for what needs no grant."""
        self._exchanges[exchange.id] = exchange
        exchange.runtime = runtime
        try:
            link = self._links.get(runtime) or self._connect(runtime)
        except zmq.ZMQError as error:  # too many open files
            self.drop(exchange)
            message = f"the api_server cannot connect to the engine of {exchange.model} ({error}); try later"
            exchange.fail(HttpError(503, "no_connection", message, retry_after_s=_NO_CONNECTION_RETRY_S))
            return
        link.exchanges[exchange.id] = exchange
        link.socket.send((encode(exchange.forward()), exchange.body))

    def taken(self, exchange: Exchange, num_chunks: int) -> None:
        """So many chunks have left for the client: the runtime may send more."""
        exchange.unreturned += num_chunks
        if exchange.unreturned >= _CREDIT_STEP and not exchange.complete and exchange.runtime is not None:
            chunks, exchange.unreturned = exchange.unreturned, 0
            self._tell_runtime(exchange, Credit(request=exchange.id, attempt=exchange.attempt, chunks=chunks))

    def drop(self, exchange: Exchange) -> None:
        """The client has gone, or its answer cannot go on: nothing more is wanted of it."""
        if self._exchanges.get(exchange.id) is not exchange:
            return
        if exchange.runtime is not None:
            self._tell_runtime(exchange, Cancel(request=exchange.id, attempt=exchange.attempt))
        if exchange.counted:
            self._tell(Abandon(request=exchange.id))
        self._forget(exchange)

    async def ask(self, verb: str, model: str, device: str = "") -> AdminReply:
        """An operator's wish; the answer comes when it is carried out or refused."""
        ask = AskAdmin(ask=str(self.new_id()), verb=verb, model=model, device=device)
        reply: asyncio.Future[AdminReply] = self._loop.create_future()
        self._asks[ask.ask] = (ask, reply)
        self._tell(ask)
        try:
            return await reply
        finally:
            del self._asks[ask.ask]

    # ------------------------------------------------------------ the router

    def _tell(self, message: Message) -> None:
        self._router.send((encode(message),))

    def _beat(self) -> None:
        self._beat_timer = self._loop.call_later(_BEAT_S, self._beat)
        self._tell(ApiBeat(api=self.api))
        self._num_beats += 1
        if self._num_beats % _PING_EVERY_BEATS == 0:
            self._ping()

    def _from_router(self, frames: list[bytes]) -> None:
        try:
            message = decode_router_to_api(frames[0])
        except DECODE_ERRORS:
            self._count_undecodable("the router")
            return
        match message:
            case Grant():
                self._granted(message)
            case Status():
                self._take_status(message)
            case Refuse():
                self._refused(message)
            case Lost(request=request, attempt=attempt, reason=reason):
                exchange = self._exchanges.get(request)
                if exchange is not None and exchange.attempt == attempt:
                    self._lost(exchange, reason)
            case Introduce():
                self._introduce()
            case AdminReply():
                ask = self._asks.get(message.ask)
                if ask is not None and not ask[1].done():
                    ask[1].set_result(message)

    def _introduce(self) -> None:
        """A new router: tell it what runs, then what waits."""
        running = [e for e in self._exchanges.values() if e.counted and e.runtime is not None]
        granted = [(exchange.key, exchange.runtime) for exchange in running if exchange.runtime is not None]
        self._tell(ApiHello(api=self.api, granted=granted))
        for exchange in self._exchanges.values():
            if exchange.counted and exchange.runtime is None:
                self._tell(exchange.submit())
        for ask, _ in self._asks.values():
            self._tell(ask)

    def _granted(self, grant: Grant) -> None:
        exchange = self._exchanges.get(grant.request)
        if exchange is None:
            self._tell(Abandon(request=grant.request))  # it left meanwhile; the place is free again
        elif exchange.runtime is None and exchange.attempt == grant.attempt:
            exchange.queued_s, exchange.activation_s = grant.queued_s, grant.activation_s
            exchange.due = grant.due
            self.forward(exchange, grant.runtime)

    def _refused(self, refusal: Refuse) -> None:
        exchange = self._exchanges.get(refusal.request)
        if exchange is not None and exchange.runtime is None:
            self._forget(exchange)
            exchange.fail(
                HttpError(refusal.status, refusal.code, refusal.message, retry_after_s=refusal.retry_after_s)
            )

    def _take_status(self, status: Status) -> None:
        now = time.monotonic()
        if self.status is None or self.status.epoch != status.epoch:
            self._epoch_since = now
        self.status, self._status_at = status, now
        living = {model.runtime for model in status.models}
        living |= {other.runtime for model in status.models for other in model.others}
        for runtime, link in list(self._links.items()):
            if runtime in living:
                link.epoch = status.epoch
                continue
            if link.epoch != status.epoch and now - self._epoch_since < _ROUTER_LEARNS_S:
                continue  # the router is new, and has not heard of it yet
            # The router does not know of what needs no grant, so it does not tell that those are lost.
            for exchange in [e for e in link.exchanges.values() if not e.counted]:
                self._lost(exchange, f"{runtime} is gone")
            if not link.exchanges:
                link.socket.close()
                del self._links[runtime]
        self._on_status(status)

    # ------------------------------------------------------------ runtimes

    def _connect(self, runtime: RuntimeId) -> _Link:
        def on_frames(frames: list[bytes]) -> None:
            self._from_runtime(link, frames)

        socket = FrameSocket(self._context, zmq.DEALER, on_frames, identity=self.api.encode())
        socket.connect(addresses.runtime_requests(self._run_dir, runtime))
        link = self._links[runtime] = _Link(socket)
        return link

    def _tell_runtime(self, exchange: Exchange, message: Message) -> None:
        assert exchange.runtime is not None
        if link := self._links.get(exchange.runtime):
            link.socket.send((encode(message),))

    def _from_runtime(self, link: _Link, frames: list[bytes]) -> None:
        try:
            message = decode_runtime_to_api(frames[0])
            if isinstance(message, Chunk) != (len(frames) == 2):
                raise DECODE_ERRORS[0]("a Chunk has two frames, others one")
        except DECODE_ERRORS:
            self._count_undecodable("a runtime")
            return
        if isinstance(message, Pong):
            self._check_running(link, message)
            return
        exchange = link.exchanges.get(message.request)
        if exchange is None or exchange.attempt != message.attempt:
            return  # about a request that was dropped, or its first attempt
        match message:
            case Chunk(seq=seq, last=last):
                if seq != exchange.next_seq or exchange.head is None:
                    self._give_up(exchange, "a part of the answer was lost on its way")
                    return
                exchange.next_seq = seq + 1
                exchange.chunks.append(frames[1])
                if last:
                    exchange.complete = True
                    self._forget(exchange)
                exchange.wake()
            case Head():
                exchange.head = message
            case Broke(started=started, message=reason):
                if started:
                    self._give_up(exchange, reason)
                else:
                    self._lost(exchange, reason)

    def _ping(self) -> None:
        for link in self._links.values():
            if link.exchanges and not link.pinged:
                link.pinged = [exchange.key for exchange in link.exchanges.values()]
                link.socket.send((encode(Ping()),))

    def _check_running(self, link: _Link, pong: Pong) -> None:
        """Frames stay in order: what was forwarded before the ping, is not complete, and is not running there,
        has been lost."""
        pinged, link.pinged = link.pinged, []
        running = set(pong.running)
        for key in pinged:
            exchange = link.exchanges.get(key.request)
            if exchange is not None and exchange.attempt == key.attempt and key not in running:
                self._lost(exchange, f"{pong.runtime} does not have it")

    # ------------------------------------------------------------ ends

    def _lost(self, exchange: Exchange, reason: str) -> None:
        """One more try if the client has not seen a byte yet."""
        if exchange.counted and exchange.may_retry:
            self._unlink(exchange)
            exchange.begin_again()
            self.retried += 1
            self._tell(exchange.submit())
        else:
            self._give_up(exchange, reason)

    def _give_up(self, exchange: Exchange, reason: str) -> None:
        self.drop(exchange)
        message = f"{exchange.model} did not finish its answer ({reason}); send the request again"
        exchange.fail(HttpError(502, "model_lost", message))

    def _unlink(self, exchange: Exchange) -> None:
        if exchange.runtime is not None and (link := self._links.get(exchange.runtime)):
            link.exchanges.pop(exchange.id, None)

    def _forget(self, exchange: Exchange) -> None:
        self._exchanges.pop(exchange.id, None)
        self._unlink(exchange)

    def _count_undecodable(self, sender: str) -> None:
        self.undecodable += 1
        if self.undecodable == 1:
            log.warning("dropped a frame of %s that does not decode; more are only counted", sender)
