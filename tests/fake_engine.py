"""A runtime without SGLang: speaks all messages of a worker, and answers with a small app behind AsgiBridge.

Requests tell it how to behave by fields of their body: ``tag`` names them in the lines that it prints ("took",
"gone", "done"), ``delay_ms`` makes them take so long, ``hold`` makes them wait until stdin has a line
"release <hold>", ``hold_after`` does so after that many chunks, ``chunks`` and ``chunk_bytes`` size the answer,
``promise`` asks for the deadline that came along.
``python -m tests.fake_engine --runtime R --run-dir D``
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import uvloop
import zmq
import zmq.asyncio
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from prism_sgl import addresses, messages
from prism_sgl.engine.bridge import AsgiBridge
from prism_sgl.engine.deadlines import promised
from prism_sgl.messages import (
    AskHello,
    Hello,
    Load,
    RuntimeFacts,
    RuntimeId,
    RuntimeState,
    RuntimeToRouter,
    SetQuota,
    Sleep,
    Slept,
    Wake,
    Woke,
)

MIB = 1 << 20
FACTS = RuntimeFacts(
    weights_bytes=16 * MIB,
    overhead_bytes=2 * MIB,
    kv_bytes_per_token=1024,
    max_request_tokens=2048,
    floor_bytes=2 * MIB,
    ceiling_bytes=32 * MIB,
    max_running_requests=256,
    block_tokens=1,
)


def say(line: str) -> None:
    print(line, flush=True)


def say_of(what: str, tag: str) -> None:
    if tag:
        say(f"{what} {tag}")


def promise_seen() -> dict[str, float] | None:
    """What SGLang's scheduler would be told of the request that is being answered."""
    if (promise := promised()) is None:
        return None
    now = time.monotonic()
    return {
        "in_s": promise.deadline - now,
        "waited_s": now - promise.arrival,
        "priority": promise.priority,
        "needed_s": promise.needed_s,
    }


class Holds:
    """Names that somebody waits for, released by lines on stdin."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    async def wait(self, name: str | None) -> None:
        if name:
            await self._events.setdefault(name, asyncio.Event()).wait()

    def release(self, name: str) -> None:
        self._events.setdefault(name, asyncio.Event()).set()


def build_app(holds: Holds, model: str) -> Starlette:
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            done = asyncio.Event()

            def after() -> None:  # as SGLang aborts: not in the generator, which waits to be collected
                if not done.is_set():
                    say_of("gone", body.get("tag", ""))

            return StreamingResponse(
                _stream_chat(body, done), media_type="text/event-stream", background=BackgroundTask(after)
            )
        if await _held(request, body):
            return Response(status_code=499)
        num_tokens = int(body.get("max_tokens") or 8)
        text = body["messages"][-1]["content"]
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": f"{model} heard {text}"}}
                | {"finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 7, "completion_tokens": num_tokens, "total_tokens": 7 + num_tokens},
        }
        if body.get("promise"):
            answer["promise"] = promise_seen()
        return JSONResponse(answer)

    async def _held(request: Request, body: dict[str, Any]) -> bool:
        """True: the client went away. Asks as SGLang does, by is_disconnected between short waits."""
        tag = body.get("tag", "")
        say_of("took", tag)
        await asyncio.sleep(body.get("delay_ms", 0) / 1000)
        if hold := body.get("hold"):
            waiter = asyncio.create_task(holds.wait(hold))
            while not waiter.done():
                await asyncio.wait({waiter}, timeout=0.02)
                if await request.is_disconnected():
                    waiter.cancel()
                    say_of("gone", tag)
                    return True
        say_of("done", tag)
        return False

    async def _stream_chat(body: dict[str, Any], done: asyncio.Event) -> AsyncIterator[bytes]:
        tag, num_chunks = body.get("tag", ""), int(body.get("chunks", 4))
        say_of("took", tag)
        await holds.wait(body.get("hold"))
        for number in range(num_chunks):
            if number == body.get("hold_after"):
                say(f"holding {tag}")
                await holds.wait(f"after {tag}")
            text = "x" * int(body["chunk_bytes"]) if "chunk_bytes" in body else f"{number} "
            chunk = {
                "id": "x",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": model,
                "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
            }
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            if body.get("promise"):
                say(f"promise {json.dumps(promise_seen())}")
            if body.get("count"):
                say(f"sent {tag} {number + 1}")
        yield b"data: [DONE]\n\n"
        done.set()
        say_of("done", tag)

    async def completions(request: Request) -> Response:
        body = await request.json()
        return StreamingResponse(_stream_completion(body), media_type="text/event-stream")

    async def _stream_completion(body: dict[str, Any]) -> AsyncIterator[bytes]:
        """One chunk a token, as SGLang does it; no time passes between them."""
        num_tokens = int(body["max_tokens"])
        for number in range(num_tokens):
            finish = "length" if number == num_tokens - 1 else None
            choice = {"index": 0, "text": f"{number} ", "finish_reason": finish}
            chunk = {
                "id": "x",
                "object": "text_completion",
                "created": 1,
                "model": model,
                "choices": [choice],
            }
            yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
        yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def generate(request: Request) -> Response:
        body = await request.body()
        content = json.loads(body)
        if await _held(request, content):
            return Response(status_code=499)
        if content.get("raise"):
            raise RuntimeError("a prompt that nobody shall read in a log")
        if "binary" in content:
            return StreamingResponse(_stream_bytes(content), media_type="application/octet-stream")
        meta = {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 2}
        answer = {"text": "ok", "meta_info": meta, "body_bytes": len(body)}
        if content.get("headers"):
            answer["headers"] = dict(request.headers)
        if content.get("promise"):
            answer["promise"] = promise_seen()
        return JSONResponse(answer)

    async def _stream_bytes(body: dict[str, Any]) -> AsyncIterator[bytes]:
        yield b"first"
        await holds.wait(f"after {body.get('tag')}")
        yield b"second"

    async def model_info(request: Request) -> Response:
        if await _held(request, dict(request.query_params)):
            return Response(status_code=499)
        return JSONResponse({"model_path": f"/models/{model}", "is_generation": True})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/generate", generate, methods=["POST"]),
            Route("/model_info", model_info),
            Route("/get_model_info", model_info),
        ]
    )


class FakeEngine:
    def __init__(self, runtime: RuntimeId, run_dir: str, *, hold_wakes: bool = False) -> None:
        self.runtime = runtime
        self.model, _, place = runtime.rpartition("@")
        self.device = place.partition(".")[0]
        self.holds = Holds()
        self.state = RuntimeState.AWAKE
        self._hold_wakes = hold_wakes
        self._num_wakes = 0
        context = zmq.asyncio.Context()
        self.router = context.socket(zmq.DEALER)
        self.router.setsockopt(zmq.IDENTITY, runtime.encode())
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.connect(addresses.router_for_runtimes(run_dir))
        self.bridge = AsgiBridge(build_app(self.holds, self.model), runtime, run_dir, self.report)

    def report(self, message: RuntimeToRouter) -> None:
        self.router.send(messages.encode(message), zmq.NOBLOCK)

    def hello(self) -> Hello:
        return Hello(
            runtime=self.runtime,
            model=self.model,
            device=self.device,
            state=self.state,
            facts=FACTS,
            running=self.bridge.running,
            start_s=0.1,
        )

    async def run(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_reader(sys.stdin, self._read_stdin)
        async with self.bridge:
            self.report(self.hello())
            say("ready")
            tasks = [asyncio.create_task(self._obey()), asyncio.create_task(self._beat())]
            await stop.wait()
            for task in tasks:
                task.cancel()

    def _read_stdin(self) -> None:
        line = sys.stdin.readline()
        if not line:
            asyncio.get_running_loop().remove_reader(sys.stdin)
        elif line.startswith("release "):
            self.holds.release(line.removeprefix("release ").strip())
        elif line.startswith("counts"):
            say(f"counts {self.bridge.undecodable} {self.bridge.repeated} {len(self.bridge.running)}")

    async def _obey(self) -> None:
        while True:
            match messages.decode_router_to_runtime(await self.router.recv()):
                case AskHello():
                    self.report(self.hello())
                case Sleep():
                    self.state, self.bridge.awake = RuntimeState.ASLEEP, False
                    self.report(Slept(runtime=self.runtime, seconds=0.001))
                case Wake():
                    self.state = RuntimeState.WAKING
                    self._num_wakes += 1
                    say(f"waking {self._num_wakes}")
                    if self._hold_wakes:
                        await self.holds.wait(f"wake {self._num_wakes}")
                    self.state, self.bridge.awake = RuntimeState.AWAKE, True
                    self.report(Woke(runtime=self.runtime, seconds=0.002))
                case SetQuota():
                    pass

    async def _beat(self) -> None:
        while True:
            asleep = self.state is RuntimeState.ASLEEP
            self.report(
                Load(
                    runtime=self.runtime,
                    state=self.state,
                    weights_bytes=0 if asleep else FACTS.weights_bytes,
                    kv_bytes=0 if asleep else FACTS.floor_bytes,
                    wanted_bytes=0,
                    in_flight=len(self.bridge.running),
                )
            )
            await asyncio.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--hold-wakes", action="store_true")
    given = parser.parse_args()

    async def run() -> None:
        await FakeEngine(RuntimeId(given.runtime), given.run_dir, hold_wakes=given.hold_wakes).run()

    uvloop.run(run())  # as the worker does


if __name__ == "__main__":
    main()
