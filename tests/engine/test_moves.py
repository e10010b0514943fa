"""Two real models on two host devices: what moves, who goes first, and what that does to tokens and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from prism_sgl.deadline_order import AGED_EVERY
from prism_sgl.schedulers.grants import WINDOW_EXTRA
from tests.engine.reference import MODEL_PATH, greedy_given
from tests.engine.system import System, running, wait_for
from tests.engine.test_tokens import MIB, long_prompt

pytestmark = pytest.mark.engine

MODELS = ("chat", "code")
MAX_WAIT_S = 2.0
ENGINE_WINDOW = 4 + WINDOW_EXTRA


# host0 and host1 hold chat and code awake; in the beginning each has one of them. An engine runs four requests at once,
# so that the others wait in the router. Nothing moves by itself, for that hangs on how long a start takes here
# (tests/launch/test_moves.py has that). SGLang logs requests, which says what engine took up which of them. left and
# right have a device that holds one of them.
def table(name: str, devices: str, slo: str = "", args: str = "") -> str:
    """Of one model; ``{path}`` is filled in later."""
    return f"""
[models.{name}]
path = "{{path}}"
devices = {devices}
max_kv = "64MiB"
{slo}
[models.{name}.engine_args]
context_length = 512
dtype = "float32"
{args}
log_requests = true
log_requests_level = 0
"""


CONFIG = (
    """
[server]
port = {port}
run_dir = "{run_dir}"
log_dir = "{log_dir}"
drain_timeout = "2s"
[scheduler]
min_move_gain = 10.0
min_residence = "0s"
max_wait = "2s"
prefill_window = 1
[memory]
weights_page = "2MiB"
[[devices]]
name = "host0"
kind = "host"
memory = "1120MiB"
[[devices]]
name = "host1"
kind = "host"
memory = "1120MiB"
[[devices]]
name = "host2"
kind = "host"
memory = "640MiB"
"""
    + table("chat", '["host0"]', "slo = {{ ttft_ms = 2000, tpot_ms = 100 }}", "max_running_requests = 4")
    + table(
        "code", '["host0", "host1"]', "slo = {{ ttft_ms = 60000, tpot_ms = 100 }}", "max_running_requests = 4"
    )
    + table("left", '["host2"]')
    + table("right", '["host2"]')
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    if not (MODEL_PATH / "config.json").exists():
        pytest.fail("no SmolLM2; run `make model`")
    with running(tmp_path_factory.mktemp("pair"), CONFIG, path=MODEL_PATH) as system:
        yield system


@dataclass
class Stream:
    """One streamed answer as its client sees it. Times are 0 until then."""

    model: str
    prompt: list[int]
    num_tokens: int
    headers: dict[str, str]
    sent_at: float = field(default_factory=time.monotonic)
    first_at: float = 0.0
    ended_at: float = 0.0
    rid: str = ""
    cached_tokens: int = 0
    queued_s: float = 0.0  # in the router
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.sent_at

    def read(self, system: System) -> None:
        body = {
            "input_ids": self.prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": self.num_tokens, "ignore_eos": True},
            "stream": True,
        }
        url, data = f"/m/{self.model}/generate", ""
        with system.client.stream("POST", url, json=body, headers=self.headers) as reply:
            assert reply.status_code == 200, reply.read()
            self.queued_s = float(reply.headers["x-prism-queue-ms"]) / 1000
            for data in (line.removeprefix("data: ") for line in reply.iter_lines() if line):
                if data != "[DONE]":
                    self._take(json.loads(data))
        assert data == "[DONE]"
        self.ended_at = time.monotonic()

    def _take(self, part: dict[str, Any]) -> None:
        assert "error" not in part, part
        assert part["output_ids"][: len(self.tokens)] == self.tokens, "a stream took a token back"
        self.tokens = part["output_ids"]
        self.rid = part["meta_info"]["id"]
        self.cached_tokens = part["meta_info"]["cached_tokens"]
        if not self.first_at:
            self.first_at = time.monotonic()


class Clients:
    """Everything that a test asks. ``finish`` says whether all went well."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._pool = ThreadPoolExecutor(64)
        self._before = taken(system)
        self._futures: list[Future[None]] = []
        self._stopping = threading.Event()
        self._num_loops = 0
        self.streams: list[Stream] = []

    def ask(self, model: str, prompt: list[int], num_tokens: int, **headers: str) -> Stream:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        stream = Stream(model, prompt, num_tokens, given)
        self.streams.append(stream)
        self._futures.append(self._pool.submit(stream.read, self._system))
        return stream

    def keep_asking(self, model: str, prompt_tokens: int, num_tokens: int, **headers: str) -> None:
        """One request after the other, until ``stop``."""
        self._num_loops += 1
        self._futures.append(
            self._pool.submit(self._loop, self._num_loops, model, prompt_tokens, num_tokens, headers)
        )

    def _loop(
        self, number: int, model: str, prompt_tokens: int, num_tokens: int, headers: dict[str, str]
    ) -> None:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        turn = 0
        while not self._stopping.is_set():
            turn += 1
            stream = Stream(model, long_prompt(1000 * number + turn, prompt_tokens), num_tokens, given)
            self.streams.append(stream)
            stream.read(self._system)

    def stop(self) -> None:
        self._stopping.set()

    def finish(self) -> None:
        """All are answered in full, with the right tokens, and each was taken up by one engine."""
        self.stop()
        for future in self._futures:
            future.result()
        self._pool.shutdown()
        for stream in self.streams:
            assert len(stream.tokens) == stream.num_tokens
            assert stream.tokens == greedy_given(stream.prompt, stream.tokens)
        asked = Counter((stream.model, stream.rid) for stream in self.streams)
        assert (
            Counter((runtime.partition("@")[0], rid) for runtime, rid in taken(self._system))
            - Counter((runtime.partition("@")[0], rid) for runtime, rid in self._before)
            == asked
        )


def taken(system: System) -> list[tuple[str, str]]:
    """Runtime and id of each request that an engine has taken up, from SGLang's own logs."""
    return [
        (file.name.removeprefix("rt-").removesuffix(".log"), rid)
        for file in system.log_dir.glob("rt-*.log")
        for rid in re.findall(r"Receive: obj=GenerateReqInput\(rid='(\w+)'", file.read_text(errors="replace"))
    ]


def told(system: System, model: str) -> dict[str, Any]:
    status: dict[str, Any] = system.client.get(f"/api/v1/models/{model}").json()
    return status


def device_of(system: System, model: str) -> str:
    return str(told(system, model)["device"])


def other_device(device: str) -> str:
    return "host1" if device == "host0" else "host0"


def held_on(system: System, model: str, device: str) -> dict[str, int]:
    """Bytes of its arenas there, as the kernel has it."""
    return {
        name.rpartition(":")[2]: size
        for name, size in system.arenas().items()
        if name.startswith(f"{model}@{device}.")
    }


def owners_on(system: System, device: str) -> set[str]:
    with system.ledger(device) as ledger:
        return {owner.name.partition("@")[0] for owner in ledger.owners()}


def wait_told(system: System, what: str, true: Callable[[], bool], timeout_s: float = 90) -> None:
    """Until the server says so; if it does not, with its reasons."""
    try:
        wait_for(what, true, timeout_s, every_s=0.2)  # looking takes from the cores that the engines need
    except AssertionError as error:
        texts = [system.client.get(f"/api/v1/models/{m}/explain").json()["message"] for m in MODELS]
        events = system.client.get("/api/v1/events").json()["events"]
        raise AssertionError("\n".join([str(error), *texts, *events])) from None


def bring_together(system: System) -> None:
    """Both on one device, whatever was before."""
    device = device_of(system, "chat")
    if device_of(system, "code") != device:
        reply = system.client.post(f"/api/v1/models/code/move?device={device}")
        assert reply.status_code == 200, reply.text
        wait_told(system, "the source to end", lambda: not told(system, "code")["others"])


def test_a_decoding_model_moves_and_nobody_notices(pair: System) -> None:
    source = device_of(pair, "code")
    target = other_device(source)
    clients = Clients(pair)
    known = long_prompt(500, 40)
    first = clients.ask("code", known, 2)
    before = [clients.ask("code", long_prompt(501 + i, 30), 240) for i in range(2)]
    wait_for("all to stream", lambda: first.ended_at and all(stream.first_at for stream in before))
    clients.keep_asking("code", 20, 12)

    program = [sys.executable, "-m", "prism_sgl", "move", "code", target]
    done = subprocess.run(
        program, env={**os.environ, "PRISM_HOST": pair.url}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    switched_at, status = time.monotonic(), told(pair, "code")
    after = clients.ask("code", known, 24)
    wait_for("the target to answer", lambda: after.first_at)
    clients.stop()
    left = told(pair, "code")["others"]
    clients.finish()

    assert status["device"] == target
    assert status["moves"] == 1
    assert [(other["role"], other["device"]) for other in left] == [("leaving", source)]
    assert all(stream.ended_at > switched_at for stream in before), "the source did not have to drain"
    assert any(first.ended_at < stream.sent_at < switched_at for stream in clients.streams[3:])
    by_rid = {rid: runtime for runtime, rid in taken(pair)}
    assert {by_rid[stream.rid].rpartition(".")[0] for stream in before} == {f"code@{source}"}
    assert by_rid[after.rid] == status["runtime"]
    assert after.cached_tokens == 0, "the source had this prompt in its cache"

    wait_told(pair, "the source to end", lambda: not told(pair, "code")["others"])
    assert held_on(pair, "code", source) == {}
    assert held_on(pair, "code", target)["weights"] >= 500 * MIB
    assert owners_on(pair, source) == set()
    assert owners_on(pair, target) == {"chat", "code"}
    with pair.ledger(source) as ledger:
        assert ledger.totals().free == ledger.budget
    events = pair.client.get("/api/v1/events").json()["events"]
    assert f"code (leaving on {source}): cold (exit code 0)" in events


def test_tight_deadlines_of_one_model_go_before_many_requests_of_the_other(pair: System) -> None:
    bring_together(pair)
    clients = Clients(pair)
    usual = [clients.ask("code", long_prompt(600 + i, 40), 4) for i in range(16)]
    wait_for("some to start", lambda: any(stream.first_at for stream in usual))
    tight = [clients.ask("chat", long_prompt(640 + i, 40), 4, x_slo_ttft_ms="15000") for i in range(4)]
    clients.finish()
    assert max(stream.ttft_s for stream in tight) < 15.0
    last = max(stream.first_at for stream in tight)
    late = sum(stream.first_at > last for stream in usual)
    assert late >= len(usual) // 2


def test_a_request_without_slo_does_not_starve(pair: System) -> None:
    """Others of higher priority and with time to spare keep coming, more than the model can answer."""
    bring_together(pair)
    clients = Clients(pair)
    for _ in range(12):
        clients.keep_asking("chat", 40, 8, x_slo_ttft_ms="15000", x_prism_priority="1")
    wait_told(pair, "a queue", lambda: told(pair, "chat")["queued"] >= 4)
    forgotten = clients.ask("chat", long_prompt(700, 40), 8)
    wait_for("its answer", lambda: forgotten.ended_at)
    queued = told(pair, "chat")["queued"]
    clients.finish()
    assert queued >= 4, "the others left room all the time"
    assert forgotten.queued_s >= MAX_WAIT_S, "the others did not go before it"
    aged_at = forgotten.sent_at + MAX_WAIT_S
    passed = sum(aged_at < stream.first_at < forgotten.first_at for stream in clients.streams)
    # Of the router's grants every fourth is for who has aged; what the engine has before it are an engine's window, and
    # as many again that may pass it there.
    assert passed <= AGED_EVERY + 2 * ENGINE_WINDOW


def test_a_long_answer_is_set_aside_for_the_turn_of_the_other_model(pair: System) -> None:
    """Who waits for memory gets its turn after max_wait, and answers under way then have as long to end."""
    clients = Clients(pair)
    long = clients.ask("left", long_prompt(900, 40), 400)
    wait_for("it to stream", lambda: long.first_at)
    short = clients.ask("right", long_prompt(901, 40), 8)
    wait_for("the other's answer", lambda: short.ended_at)
    assert 0 < len(long.tokens) < 400
    clients.finish()
    assert long.ended_at > short.ended_at
    assert re.search(r"sleep: 1 requests wait for the wake", pair.log_text())
    assert told(pair, "left")["wakes"] >= 1
