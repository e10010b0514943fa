"""A trace against running servers: our own with engines that only speak, and a small one that misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner, Result
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from prism_sgl.launch.cli import cli
from prism_sgl.launch.replay.client import LiveError, LiveServer, Prompts
from prism_sgl.launch.replay.live import LiveReplay, replay_live
from prism_sgl.schedulers.replay.outcomes import caught_in_moves, tpot_s, ttft_s
from prism_sgl.schedulers.replay.spec import Arrival, Slo
from tests.launch.stack import running

SLO = Slo(0.5, 0.05)
FLEET = """
devices = 1
memory = "40GiB"
[models.first]
weights = "2.30GiB"
kv_bytes_per_token = 32768
trace_model = 0
ttft_ms = 5000
tpot_ms = 1000
served_as = "talk"
[models.code]
weights = "2.30GiB"
kv_bytes_per_token = 32768
trace_model = 1
ttft_ms = 5000
tpot_ms = 1000
"""
TRACE = "arrival_s,model,prompt_tokens,output_tokens\n" + "".join(
    f"{number * 0.02:.2f},{number % 2},{20 + number},{3 + number % 5}\n" for number in range(30)
)


@dataclass
class Seen:
    """What the small server was asked: body and headers of each request, and when."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


class Server:
    """OpenAI's completions by ``answer``; ids and ignore_eos may be refused."""

    def __init__(self, *, takes_ids: bool = True, takes_ignore_eos: bool = True) -> None:
        self.seen = Seen()
        self._takes_ids, self._takes_ignore_eos = takes_ids, takes_ignore_eos
        self.mode = "good"
        self.moved = False
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/api/v1/models", self._states),
            ]
        )

    async def _models(self, request: Request) -> Response:
        if self.mode == "keyed":
            return JSONResponse({"error": {"message": "the API key is missing"}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": "m"}, {"id": "n"}]})

    async def _states(self, request: Request) -> Response:
        """As prism_sgl has it, in mode "moves": the model is on another device once it is asked for ``moved``."""
        if self.mode != "moves":
            return Response(status_code=404)
        device = "host1" if self.moved else "host0"
        listed = [
            {
                "name": name,
                "state": "awake",
                "device": device,
                "wakes": 3 + self.moved,
                "moves": 2 * self.moved,
            }
            for name in "mn"
        ]
        return JSONResponse({"models": listed})

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        if not self._takes_ids and isinstance(body["prompt"], list):
            return JSONResponse({"error": {"message": "prompt is no text"}}, 400)
        if not self._takes_ignore_eos and "ignore_eos" in body:
            return JSONResponse({"error": {"message": "ignore_eos is not known"}}, 400)
        self.seen.bodies.append(body)
        self.seen.headers.append(dict(request.headers))
        if self.mode == "busy":
            return JSONResponse({"error": {"message": "too many wait"}}, 503)
        return StreamingResponse(self._stream(body["max_tokens"]), media_type="text/event-stream")

    async def _stream(self, num_tokens: int) -> AsyncIterator[bytes]:
        yield b": a comment that keeps the connection alive\n\n"
        for number in range(num_tokens):
            if self.mode == "hangs" and number == 1:
                await asyncio.sleep(3600)
            if self.mode == "moves" and number == 0 and num_tokens == 9:
                self.moved = True
                await asyncio.sleep(1.2)  # a first token that comes after the watcher has looked
            if self.mode == "breaks" and number == 1:
                return
            if self.mode == "errs" and number == 1:
                yield b'data: {"error": {"message": "out of memory"}}\n\n'
                return
            # A token that is a part of a character has no text yet.
            choice = {"index": 0, "text": "" if number == 0 else "x", "finish_reason": None}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n".encode()
        usage = {"completion_tokens": num_tokens}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode()
        yield b"data: [DONE]\n\n"


@contextmanager
def serving(server: Server) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(server.app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        program = uvicorn.Server(config)
        thread = threading.Thread(target=program.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            program.should_exit = program.force_exit = True
            thread.join(30)


def replay(
    url: str, arrivals: Sequence[Arrival], *, mode: tuple[Server, str] | None = None, **options: Any
) -> LiveReplay:
    """All of model ``a``, which the server calls ``m``. ``mode`` begins after the check."""
    drain_s = options.pop("drain_s", 30.0)

    async def run() -> LiveReplay:
        async with LiveServer(url, {"a": "m"}, Prompts(**options)) as server:
            await server.check()
            if mode is not None:
                mode[0].mode = mode[1]
            return await replay_live(server, arrivals, {"a": SLO}, drain_s=drain_s)

    return asyncio.run(run())


def steady(count: int, every_s: float = 0.01) -> list[Arrival]:
    return [Arrival(number * every_s, "a", 10 + number, 4) for number in range(count)]


def test_each_request_has_its_tokens_its_slo_and_its_time() -> None:
    server = Server()
    with serving(server) as url:
        found = replay(url, steady(20))
    sent = server.seen.bodies[1:]  # the first one is the check
    assert [len(body["prompt"]) for body in sent] == [10 + number for number in range(20)]
    assert all(1000 <= token < 30000 for body in sent for token in body["prompt"])
    assert all(body["model"] == "m" and body["ignore_eos"] and body["max_tokens"] == 4 for body in sent)
    assert {headers["x-slo-ttft-ms"] for headers in server.seen.headers[1:]} == {"500.000"}
    assert {headers["x-slo-tpot-ms"] for headers in server.seen.headers[1:]} == {"50.000"}
    outcomes = found.replayed.outcomes
    assert not [outcome.failure for outcome in outcomes if outcome.failure]
    for number, outcome in enumerate(outcomes):
        assert outcome.arrived_at >= number * 0.01 - 1e-6, "none is sent before its time"
        assert 0.0 < ttft_s(outcome) < 10.0
        assert tpot_s(outcome) >= 0.0
        assert outcome.output_tokens == 4
    assert found.sent_late_p99_s < 5.0
    assert (found.migrations, found.wakes) == (None, None), "this server tells neither"


def test_prompts_differ_unless_asked_otherwise_and_are_the_same_again() -> None:
    server = Server()
    with serving(server) as url:
        for options in ({}, {}, {"seed": 1}, {"alike": True}):
            replay(url, steady(3), **options)
    prompts = [body["prompt"] for body in server.seen.bodies if len(body["prompt"]) >= 10]
    once, again, seeded, alike = (prompts[start : start + 3] for start in range(0, 12, 3))
    assert once == again != seeded
    assert len({prompt[0] for prompt in once}) == 3
    assert alike[1][:10] == alike[0] == alike[2][:10]


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("busy", "status 503: too many wait"),
        ("breaks", "the stream ended before the answer did"),
        ("errs", "broken: out of memory"),
        ("hangs", "not answered in time"),
    ],
)
def test_what_is_not_answered_whole_is_failed_by_its_reason(mode: str, told: str) -> None:
    server = Server()
    with serving(server) as url:
        found = replay(url, steady(3), mode=(server, mode), drain_s=0.3)
    assert len(found.replayed.outcomes) == 3
    for outcome in found.replayed.outcomes:
        assert told in outcome.failure
        assert outcome.ended_at is None


def test_server_that_refuses_ids_or_lengths_gets_words_and_it_is_told() -> None:
    for options, told in (
        ({"takes_ids": False}, "prompts of a are words"),
        ({"takes_ignore_eos": False}, "answers of a may end early"),
    ):
        server = Server(**options)
        with serving(server) as url:
            found = replay(url, steady(2))
        assert not any(outcome.failure for outcome in found.replayed.outcomes)
        assert any(told in note for note in found.notes)
    assert len(Prompts().text("a", 0, 12).split()) == 12


def test_moves_wakes_and_who_waited_for_a_move_are_seen_from_outside() -> None:
    server = Server()
    arrivals = [*steady(2), Arrival(0.6, "a", 10, 9)]
    with serving(server) as url:
        found = replay(url, arrivals, mode=(server, "moves"))
    assert (found.migrations, found.wakes) == (2, 1), "two are told, one of them is seen"
    caught = caught_in_moves(found.replayed.outcomes, found.replayed.moves)
    assert [id(outcome) in caught for outcome in found.replayed.outcomes] == [False, False, True]
    assert found.replayed.placement == {"host1": ["a"]}


def test_no_server_unknown_model_key_and_first_request_that_fails_are_told() -> None:
    async def check(url: str, served: dict[str, str]) -> None:
        async with LiveServer(url, served) as server:
            await server.check()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(LiveError, match=f"127.0.0.1:{port} cannot be reached.*start a server"):
        asyncio.run(check(f"http://127.0.0.1:{port}", {"a": "m"}))
    server = Server()
    with serving(server) as url:
        with pytest.raises(LiveError, match=r"'other' of models.a; it serves m, n: set served_as"):
            asyncio.run(check(url, {"a": "other"}))
        server.mode = "keyed"
        with pytest.raises(LiveError, match=r"401: the API key is missing\); .*prism-sgl --key KEY replay"):
            asyncio.run(check(url, {"a": "m"}))
        server.mode = "busy"
        with pytest.raises(LiveError, match=r"a: a first request .* status 503: too many wait"):
            asyncio.run(check(url, {"a": "m"}))


# ------------------------------------------------------------ the command, and our own server


def invoke(folder: Path, url: str, *more: str) -> tuple[Result, Path]:
    fleet, trace, out = folder / "fleet.toml", folder / "trace.csv", folder / "out.json"
    fleet.write_text(FLEET)
    trace.write_text(TRACE)
    words = ["replay", "--live", url, "--fleet", fleet, "--trace", trace, "--json", out, *more]
    return CliRunner().invoke(cli, [str(word) for word in words]), out


def test_live_replay_against_our_own_server_has_the_json_of_the_simulated_one(tmp_path: Path) -> None:
    with running(("code",), extra='[models.chat]\npath = "MODEL"\naliases = ["talk"]\n') as stack:
        result, out = invoke(tmp_path, stack.url, "--rate-scale", "1,2", "--time-scale", "0.5")
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    runs = content["runs"]
    assert [(run["rate_scale"], run["requests"], run["failed"]) for run in runs] == [
        (1.0, 30, 0),
        (2.0, 60, 0),
    ]
    for run in runs:
        assert (run["policy"], run["gpus"], run["migrations"], run["wakes"]) == ("live", 1, 0, 0)
        assert run["ttft_attainment"] == run["tpot_attainment"] == 1.0
        assert 0.0 < run["ttft_p50_s"] <= run["ttft_p99_s"] < 5.0
        assert run["gpu_busy"] is None
        assert run["placement"] == {"host0": ["first", "code"]}, "by the fleet's names, not by the server's"
    assert content["live"] == stack.url
    simulated = CliRunner().invoke(
        cli,
        f"replay --fleet {tmp_path}/fleet.toml --trace {tmp_path}/trace.csv --policy prism --json {out}".split(),
    )
    assert simulated.exit_code == 0, simulated.output
    assert set(json.loads(out.read_text())["runs"][0]) <= set(runs[0])


def test_live_command_says_what_is_wrong(tmp_path: Path) -> None:
    for url in ("127.0.0.1:30000", "http://127.0.0.1:abc", "http://[::1", "http://127.0.0.1:99999"):
        result, _ = invoke(tmp_path, url)
        assert result.exit_code == 2 and "is no address" in result.output
    result, _ = invoke(tmp_path, "http://127.0.0.1:9", "--policy", "static")
    assert result.exit_code == 2 and "leave it out with --live" in result.output
    result, _ = invoke(tmp_path, "http://127.0.0.1:9", "--token-ids", "5")
    assert result.exit_code == 2 and "no range of token ids" in result.output
    result, _ = invoke(tmp_path, "http://127.0.0.1:9")
    assert isinstance(result.exception, LiveError)
