"""What dies, dies alone: kill -9 of a runtime and of the router with requests in flight."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.engine.reference import greedy
from tests.engine.system import System, wait_for
from tests.engine.test_tokens import long_prompt

pytestmark = pytest.mark.engine


def router_pid(system: System) -> int:
    return next(pid for pid, line in system.processes().items() if "prism_sgl.launch.router" in line)


def test_kill_of_the_router_loses_and_doubles_nothing(system: System) -> None:
    jobs = [("chat" if i % 2 else "code", long_prompt(100 + i, 40), 60) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(system.generate, *job) for job in jobs]
        wait_for("requests to run", lambda: sum(system.status(m)["in_flight"] for m in ("chat", "code")) >= 4)
        old = router_pid(system)
        os.kill(old, signal.SIGKILL)
        answers = [f.result() for f in futures]
    for (_, ids, num_tokens), answer in zip(jobs, answers, strict=True):
        assert answer["output_ids"] == greedy(tuple(ids), num_tokens)
    assert router_pid(system) != old
    wait_for("the new router to know all", lambda: system.status("chat")["state"] == "awake")


def test_kill_of_a_runtime_harms_nobody_else(system: System) -> None:
    """Streams that have begun end in an error, others are tried once more, the neighbour notices nothing."""
    stream_body = {
        "input_ids": long_prompt(200, 30),
        "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
        "stream": True,
    }

    def broken_stream() -> tuple[bytes, str]:
        received = b""
        try:
            with httpx.stream(
                "POST", f"{system.url}/m/code/generate", json=stream_body, timeout=120
            ) as reply:
                for part in reply.iter_bytes():
                    received += part
        except httpx.HTTPError as error:
            return received, type(error).__name__
        return received, "ended"

    system.generate("code", long_prompt(201, 8), 1)
    with ThreadPoolExecutor(8) as pool:
        stream = pool.submit(broken_stream)
        neighbours = [pool.submit(system.generate, "chat", long_prompt(210 + i, 30), 60) for i in range(2)]
        whole = [pool.submit(system.generate, "code", long_prompt(220 + i, 30), 60) for i in range(2)]
        wait_for("all to run", lambda: system.status("code")["in_flight"] >= 3)
        before = system.runtime_pids("code")
        wait_for("the stream to have begun", lambda: "code" in system.log_text())
        os.kill(before["scheduler"], signal.SIGKILL)
        received, end = stream.result()
        answers: list[dict[str, Any]] = [f.result() for f in neighbours + whole]
    assert b"output_ids" in received or b"text" in received
    assert b"error" in received or end != "ended"
    assert b"[DONE]" not in received
    for i, answer in enumerate(answers[:2]):
        assert answer["output_ids"] == greedy(tuple(long_prompt(210 + i, 30)), 60)
    for i, answer in enumerate(answers[2:]):
        assert answer["output_ids"] == greedy(tuple(long_prompt(220 + i, 30)), 60)
    after = system.runtime_pids("code")
    assert after["scheduler"] != before["scheduler"]
    assert not os.path.exists(f"/proc/{before['worker']}")
