"""One request at an ASGI app: the ``receive`` and ``send`` that the app is called with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from prism_sgl.messages import Chunk, Forward, Head, RequestKey

AsgiMessage = MutableMapping[str, Any]
AsgiApp = Callable[
    [
        MutableMapping[str, Any],
        Callable[[], Awaitable[AsgiMessage]],
        Callable[[AsgiMessage], Awaitable[None]],
    ],
    Awaitable[None],
]

# Of an answer's end, where SGLang tells what it used.
_USAGE_BYTES = 4096


class Bridge(Protocol):
    """What an exchange needs of its owner."""

    loop: asyncio.AbstractEventLoop

    def reply(self, exchange: Exchange, message: Head | Chunk, body: bytes | None = None) -> None: ...

    def first_byte(self, exchange: Exchange) -> None: ...

    def end(self, exchange: Exchange, outcome: str) -> None: ...


class Exchange:
    """Flow is by credit: when none is left, ``send`` waits."""

    def __init__(self, bridge: Bridge, peer: bytes, forward: Forward, body: bytes) -> None:
        self.key = RequestKey(forward.request, forward.attempt)
        self.peer = peer
        self.counted = forward.counted
        self.path = forward.path
        self.gone = False  # the client, or the api_server
        self.complete = False  # the last chunk is out, or the runtime gave up
        self.status = 0
        self.started_told = False
        self.first_told = False
        self.answering = False  # the head is out
        self.tail = b""
        self.began = bridge.loop.time()
        self.task: asyncio.Task[None] | None = None
        self._bridge = bridge
        self._body: bytes | None = body
        self._credit = forward.credit
        self._refill: asyncio.Future[None] | None = None
        self._head: Head | None = None
        self._disconnect = asyncio.Event()
        self._seq = 0

    async def receive(self) -> AsgiMessage:
        if (body := self._body) is not None:
            self._body = None
            return {"type": "http.request", "body": body, "more_body": False}
        # Starlette polls this under a cancelled scope: an event is not used up by a wait that is cancelled.
        await self._disconnect.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: AsgiMessage) -> None:
        if self.gone:
            # As HTTP servers do: the app learns of it by receive. One that never waits needs the chance to.
            await asyncio.sleep(0)
            return
        if self.complete:
            raise RuntimeError("the app sent more after its last chunk")
        match message["type"]:
            case "http.response.start":
                self.status = message["status"]
                headers = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
                # Sent with the first chunk. The api_server has no use for it earlier: an attempt that has not
                # brought a byte of the body may still be given up for another one.
                key = self.key
                self._head = Head(
                    request=key.request, attempt=key.attempt, status=self.status, headers=headers
                )
            case "http.response.body":
                last = not message.get("more_body", False)
                if body := bytes(message.get("body", b"")):
                    await self._send_body(body, last)
                elif last:
                    await self._send_body(b"", last)
            case other:
                raise RuntimeError(f"ASGI message {other!r} is not supported")

    async def _send_body(self, body: bytes, last: bool) -> None:
        if self.status == 0:
            raise RuntimeError("the app sent a body before http.response.start")
        while self._credit <= 0 and not self.gone:
            self._refill = self._bridge.loop.create_future()
            try:
                await self._refill
            finally:
                self._refill = None
        if self.gone:
            await asyncio.sleep(0)
            return
        self._credit -= 1
        seq, self._seq = self._seq, self._seq + 1
        key = self.key
        if self._head is not None:
            self._bridge.reply(self, self._head)
            self._head = None
            self.answering = True
        self._bridge.reply(self, Chunk(request=key.request, attempt=key.attempt, seq=seq, last=last), body)
        # The client first, then the router.
        if body:
            if seq == 0:
                self._bridge.first_byte(self)
            self.tail = (
                (self.tail + body)[-_USAGE_BYTES:] if len(body) < _USAGE_BYTES else body[-_USAGE_BYTES:]
            )
        if last:
            self._bridge.end(self, "ok" if self.status < 400 else "error")

    def refill(self, chunks: int) -> None:
        self._credit += chunks
        if self._credit > 0:
            self._wake()

    def disconnect(self) -> None:
        """The client has gone. Also called at the end of an answer, where HTTP servers say so too."""
        self._disconnect.set()
        self._wake()

    def _wake(self) -> None:
        if self._refill is not None and not self._refill.done():
            self._refill.set_result(None)
