"""AsgiBridge over real sockets, with small apps: the api_server's side is played by the test."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop
import zmq
import zmq.asyncio
from starlette.requests import Request

from prism_sgl import addresses
from prism_sgl.engine import bridge as bridge_module
from prism_sgl.engine.bridge import AsgiBridge
from prism_sgl.messages import (
    ApiToRuntime,
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
    RequestId,
    RequestKey,
    RuntimeId,
    RuntimeToApi,
    Started,
    decode_runtime_to_api,
    encode,
)

RUNTIME = RuntimeId("chat@host0.1-1")
R = RequestId("r1")
App = Callable[[Any, Any, Any], Awaitable[None]]


class Peer:
    """An api_server as the bridge sees it."""

    def __init__(self, context: zmq.asyncio.Context, run_dir: str, name: bytes) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, name)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(addresses.runtime_requests(run_dir, RUNTIME))

    async def send(self, message: ApiToRuntime, body: bytes | None = None) -> None:
        await self.socket.send_multipart([encode(message), *([] if body is None else [body])])

    async def forward(
        self, request: str = R, *, credit: int = 32, body: bytes = b"{}", **fields: Any
    ) -> None:
        message = Forward(
            request=RequestId(request),
            attempt=fields.pop("attempt", 1),
            method="POST",
            path="/x",
            query=b"",
            headers=[],
            credit=credit,
            **fields,
        )
        await self.send(message, body)

    async def next(self) -> tuple[RuntimeToApi, bytes]:
        frames = await asyncio.wait_for(self.socket.recv_multipart(), 10)
        return decode_runtime_to_api(frames[0]), frames[1] if len(frames) == 2 else b""


class Bench:
    def __init__(self, bridge: AsgiBridge, events: asyncio.Queue[Any], peer: Peer, other: Peer) -> None:
        self.bridge, self.events, self.peer, self.other = bridge, events, peer, other

    async def event(self) -> Any:
        return await asyncio.wait_for(self.events.get(), 10)


@asynccontextmanager
async def bench(app: App) -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="pb-", dir="/tmp") as run_dir:
        events: asyncio.Queue[Any] = asyncio.Queue()
        context = zmq.asyncio.Context()
        peers = [Peer(context, run_dir, name) for name in (b"a", b"b")]
        try:
            async with AsgiBridge(app, RUNTIME, run_dir, events.put_nowait) as bridge:
                yield Bench(bridge, events, *peers)
        finally:
            for peer in peers:
                peer.socket.close()
            context.term()


async def start(send: Any, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"a", b"b")]})


async def part(send: Any, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 30)

    asyncio.run(bounded())


def test_answer_comes_in_numbered_chunks_and_events_tell_of_it() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, await receive()))
        await start(send)
        await part(send, b"")  # nothing to say yet: no chunk
        await part(send, b"one")
        await part(send, b'{"usage": {"prompt_tokens": 7, "completion_tokens":3}}', more=False)

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward()
            assert await b.peer.next() == (
                Head(request=R, attempt=1, status=200, headers=[(b"a", b"b")]),
                b"",
            )
            assert await b.peer.next() == (Chunk(request=R, attempt=1, seq=0, last=False), b"one")
            last, _ = await b.peer.next()
            assert last == Chunk(request=R, attempt=1, seq=1, last=True)
            assert isinstance(await b.event(), Started)
            assert isinstance(await b.event(), FirstToken)
            finished = await b.event()
            assert isinstance(finished, Finished)
            assert (finished.outcome, finished.status) == ("ok", 200)
            assert (finished.prompt_tokens, finished.completion_tokens, finished.cached_tokens) == (7, 3, 0)
            assert b.bridge.running == []
        scope, message = seen[0]
        assert scope["asgi"]["spec_version"] == "2.3"
        assert message == {"type": "http.request", "body": b"{}", "more_body": False}

    run(test())


def test_app_waits_for_credit() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await start(send)
        while sent < 10:
            await part(send, b"x", more=sent < 9)
            sent += 1

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward(credit=3)
            for _ in range(4):
                await b.peer.next()
            await b.peer.send(Ping())
            pong, _ = await b.peer.next()  # came after all that the app could send
            assert pong == Pong(runtime=RUNTIME, running=[RequestKey(R, 1)])
            assert sent == 3
            await b.peer.send(Credit(request=R, attempt=1, chunks=7))
            chunks = [(await b.peer.next())[0] for _ in range(7)]
            assert [chunk.seq for chunk in chunks if isinstance(chunk, Chunk)] == [3, 4, 5, 6, 7, 8, 9]

    run(test())


def test_cancel_is_a_disconnect_that_a_cancelled_poll_does_not_lose() -> None:
    polls: list[bool] = []
    polled = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive, send)
        await request.body()
        while not (polls and polls[-1]):
            polls.append(await request.is_disconnected())
            polled.set()
            await asyncio.sleep(0)

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward()
            await polled.wait()
            await b.peer.send(Cancel(request=R, attempt=1))
            assert isinstance(await b.event(), Started)
            finished = await b.event()
            assert (finished.outcome, finished.status) == ("cancelled", 0)
        assert polls[0] is False
        assert polls[-1] is True

    run(test())


def test_app_that_waits_for_credit_is_freed_by_cancel() -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await part(send, b"x")
        await part(send, b"y")
        ended.set()

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward(credit=1)
            await b.peer.next()
            await b.peer.next()
            await b.peer.send(Cancel(request=R, attempt=1))
            await ended.wait()

    run(test())


def test_app_that_ignores_the_disconnect_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "_CANCEL_GRACE_S", 0.01)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward()
            await b.peer.send(Cancel(request=R, attempt=1))
            assert isinstance(await b.event(), Started)
            assert (await b.event()).outcome == "cancelled"
            assert b.bridge.running == []

    run(test())


def test_same_key_runs_once_and_another_attempt_runs() -> None:
    runs = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal runs
        runs += 1
        await start(send)
        await part(send, b"", more=False)

    async def test() -> None:
        async with bench(app) as b:
            for attempt in (1, 1, 2):
                await b.peer.forward(attempt=attempt)
            answers = [(await b.peer.next())[0] for _ in range(4)]
            assert sorted({a.attempt for a in answers if not isinstance(a, Pong)}) == [1, 2]
            assert (runs, b.bridge.repeated) == (2, 1)

    run(test())


def test_answers_go_to_who_asked() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await part(send, b"", more=False)

    async def test() -> None:
        async with bench(app) as b:
            await b.other.forward("from b")
            await b.peer.forward("from a")
            for peer, request in ((b.peer, "from a"), (b.other, "from b")):
                for _ in range(2):
                    answer, _ = await peer.next()
                    assert not isinstance(answer, Pong)
                    assert answer.request == request

    run(test())


@pytest.mark.parametrize("begun", [False, True])
def test_failing_app_becomes_broke(begun: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await start(send)
            await part(send, b"x")
        raise ValueError("".join(["the ", "prompt"]))  # what stands in the source is logged with it

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward()
            if begun:
                await b.peer.next()
                await b.peer.next()
            broke, _ = await b.peer.next()
            assert isinstance(broke, Broke)
            assert broke.started is begun
            assert "ValueError" in broke.message
            events = [await b.event() for _ in range(3 if begun else 2)]
            assert isinstance(events[0], Started)
            assert events[-1].outcome == "error"
        assert "the prompt" not in caplog.text + broke.message

    run(test())


def test_uncounted_requests_are_not_told_to_the_router() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await part(send, b"x", more=False)

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward(counted=False)
            await b.peer.next()
            await b.peer.next()
            assert b.events.empty()

    run(test())


def test_nothing_that_needs_a_forward_reaches_a_sleeper() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await part(send, b"x", more=False)

    async def test() -> None:
        async with bench(app) as b:
            b.bridge.awake = False
            await b.peer.forward()
            broke, _ = await b.peer.next()
            assert isinstance(broke, Broke)
            assert not broke.started
            await b.peer.forward("info", counted=False)
            assert isinstance((await b.peer.next())[0], Head)

    run(test())


def test_undecodable_frames_are_counted_and_dropped() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start(send)
        await part(send, b"", more=False)

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.socket.send_multipart([b"nonsense"])
            await b.peer.socket.send_multipart([encode(Ping()), b"too much"])
            await b.peer.socket.send_multipart([encode(Head(request=R, attempt=1, status=1, headers=[]))])
            await b.peer.forward()
            assert isinstance((await b.peer.next())[0], Head)
            assert b.bridge.undecodable == 3

    run(test())


def test_requests_of_a_vanished_api_server_end() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await start(send)
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            await part(send, b"x" * 1000)
            await asyncio.sleep(0)

    async def test() -> None:
        async with bench(app) as b:
            await b.other.forward(credit=1_000_000)
            await b.other.next()
            b.other.socket.close()
            assert isinstance(await b.event(), Started)
            assert isinstance(await b.event(), FirstToken)
            assert (await b.event()).outcome == "cancelled"
            assert b.bridge.undeliverable == 1

    run(test())


def test_a_loop_that_stood_still_cancels_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is long to tokenize, a container that was paused: the api_servers were not silent."""
    monkeypatch.setattr(bridge_module, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(bridge_module, "_PEER_SILENT_S", 0.15)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        time.sleep(0.2)  # noqa: ASYNC251  (it is what the test is about)
        await asyncio.sleep(0.02)  # after the look that was due meanwhile
        await start(send)
        await part(send, b"x", more=False)

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward()
            assert [type(await b.event()) for _ in range(2)] == [Started, FirstToken]
            assert (await b.event()).outcome == "ok"

    uvloop.run(asyncio.wait_for(test(), 30))  # its timers come before what lies in sockets


def test_requests_of_a_silent_api_server_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(bridge_module, "_PEER_SILENT_S", 0.1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward()
            assert isinstance(await b.event(), Started)
            assert (await b.event()).outcome == "cancelled"

    run(test())


def test_answers_without_a_prefill_are_no_first_tokens_of_others() -> None:
    answer = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if (await receive())["body"] == b"in one piece":
            await answer.wait()
        await start(send)
        await part(send, b"data: an error, or an embedding", more=False)

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward("busy", body=b"in one piece")  # never a moment without a request
            await b.event()
            for number in range(3):
                await b.peer.forward(f"error {number}")
                assert [type(await b.event()) for _ in range(3)] == [Started, FirstToken, Finished]
            b.bridge.prefilled(1)
            token = await b.event()
            assert (type(token), token.request) == (FirstToken, "busy")
            answer.set()
            assert isinstance(await b.event(), Finished)

    run(test())


def test_first_token_told_by_its_byte_is_not_told_of_another() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if (await receive())["body"] == b"a stream":
            await start(send)
            await part(send, b"x")
        await receive()

    async def test() -> None:
        async with bench(app) as b:
            await b.peer.forward("stream", body=b"a stream")
            assert [type(await b.event()) for _ in range(2)] == [Started, FirstToken]
            await b.peer.forward("one piece")
            assert isinstance(await b.event(), Started)
            b.bridge.prefilled(1)  # the stream's, whose byte was quicker
            assert b.events.empty()
            b.bridge.prefilled(2)
            assert (await b.event()).request == "one piece"

    run(test())
