"""One client's request at the api_server, from its arrival to the last byte of its answer."""

from __future__ import annotations

import asyncio
import time

from prism_sgl.launch.errors_http import HttpError
from prism_sgl.launch.peek import Wish
from prism_sgl.messages import Due, Forward, Head, RequestId, RequestKey, RuntimeId, Submit

# Chunks of one answer that may exist between the app and the client's socket.
WINDOW_CHUNKS = 32


class Exchange:
    """Filled by the Forwarder, emptied by the coroutine that writes to the client.

    It has a runtime from its grant on. Until ``sent`` is set, which is when the first byte goes to the client,
    all that came may be thrown away and the request tried once more.
    """

    __slots__ = (
        "_waiter",
        "activation_s",
        "arrived",
        "attempt",
        "body",
        "chunks",
        "complete",
        "counted",
        "due",
        "failure",
        "head",
        "headers",
        "id",
        "method",
        "model",
        "next_seq",
        "path",
        "prompt_tokens",
        "query",
        "queued_s",
        "runtime",
        "sent",
        "unreturned",
        "wish",
    )

    def __init__(
        self,
        id: RequestId,
        model: str,
        *,
        method: str,
        path: str,
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        wish: Wish,
        prompt_tokens: int,
        counted: bool,
    ) -> None:
        self.id = id
        self.model = model
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.wish = wish
        self.prompt_tokens = prompt_tokens
        self.counted = counted
        self.attempt = 1
        self.runtime: RuntimeId | None = None
        self.arrived = time.monotonic()
        self.queued_s = 0.0
        self.activation_s = 0.0
        self.due: Due | None = None  # as granted
        self.head: Head | None = None
        self.chunks: list[bytes] = []
        self.complete = False
        self.failure: HttpError | None = None
        self.sent = False
        self.next_seq = 0
        self.unreturned = 0  # chunks whose credit the runtime has not back yet
        self._waiter: asyncio.Future[None] | None = None

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.id, self.attempt)

    @property
    def waited_s(self) -> float:
        """For its grant; until now, if it has none."""
        return self.queued_s if self.runtime is not None else time.monotonic() - self.arrived

    @property
    def may_retry(self) -> bool:
        return not self.sent and self.attempt == 1

    def submit(self) -> Submit:
        wish = self.wish
        return Submit(
            request=self.id,
            attempt=self.attempt,
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=wish.max_new_tokens,
            stream=wish.stream,
            priority=wish.priority,
            ttft_s=wish.ttft_s,
            tpot_s=wish.tpot_s,
            waited_s=time.monotonic() - self.arrived,
            service_tier=wish.service_tier,
        )

    def forward(self) -> Forward:
        return Forward(
            request=self.id,
            attempt=self.attempt,
            method=self.method,
            path=self.path,
            query=self.query,
            headers=self.headers,
            credit=WINDOW_CHUNKS,
            counted=self.counted,
            due=self.due,
        )

    def begin_again(self) -> None:
        """Forget the first attempt."""
        self.attempt = 2
        self.runtime = self.head = self.due = None
        self.chunks.clear()
        self.next_seq = self.unreturned = 0

    def fail(self, error: HttpError) -> None:
        self.failure = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def has_news(self) -> bool:
        # A head alone is not passed on: SGLang sends it before the prefill, and a retry must still be possible.
        return bool(self.chunks) or self.complete or self.failure is not None

    async def news(self) -> None:
        """Until there is something to write, or ``wake`` is called."""
        if not self.has_news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
