"""What dies, dies alone: kill -9 of a runtime and of the router with requests in flight."""

from __future__ import annotations

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.engine.conftest import FAILING_DEVICE
from tests.engine.reference import greedy_batch
from tests.engine.system import System, wait_for
from tests.engine.test_tokens import long_prompt

pytestmark = pytest.mark.engine
NUM_TOKENS = 40


def router_pid(system: System) -> int:
    pid = system.running_module("launch.router")
    assert pid is not None
    return pid


def expected(prompts: list[list[int]]) -> list[list[int]]:
    return greedy_batch(tuple(map(tuple, prompts)), NUM_TOKENS)


def test_kill_of_the_router_loses_and_doubles_nothing(system: System) -> None:
    prompts = [long_prompt(100 + i, 30) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(system.generate, "chat" if i % 2 else "code", prompt, NUM_TOKENS)
            for i, prompt in enumerate(prompts)
        ]
        wait_for("requests to run", lambda: sum(system.status(m)["in_flight"] for m in ("chat", "code")) >= 4)
        old = router_pid(system)
        os.kill(old, signal.SIGKILL)
        answers = [future.result()["output_ids"] for future in futures]
    assert answers == expected(prompts)
    assert router_pid(system) != old
    wait_for("the new router to know all", lambda: system.status("chat")["state"] == "awake")


def test_kill_of_a_runtime_harms_nobody_else(system: System) -> None:
    """A stream that has begun ends in an error, others are tried once more, the neighbour notices nothing."""
    body = {
        "input_ids": long_prompt(200, 30),
        "sampling_params": {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True},
        "stream": True,
    }
    whole = [long_prompt(210 + i, 30) for i in range(2)]
    neighbours = [long_prompt(220 + i, 30) for i in range(2)]
    received = b""
    with (
        ThreadPoolExecutor(8) as pool,
        httpx.stream("POST", f"{system.url}/m/code/generate", json=body, timeout=120) as stream,
    ):
        parts = stream.iter_bytes()
        received += next(parts)
        futures = [pool.submit(system.generate, "code", prompt, NUM_TOKENS) for prompt in whole]
        futures += [pool.submit(system.generate, "chat", prompt, NUM_TOKENS) for prompt in neighbours]
        wait_for("all to run", lambda: system.status("code")["in_flight"] == 3)
        before = system.runtime_pids("code")
        os.kill(before["scheduler"], signal.SIGKILL)
        # An SSE stream ends with an error event; a cut connection would be as clear.
        with contextlib.suppress(httpx.HTTPError):
            for part in parts:
                received += part
        answers = [future.result()["output_ids"] for future in futures]
    assert b"output_ids" in received
    assert b"[DONE]" not in received
    assert b"code did not finish its answer (exit code 1); send the request again" in received
    gone = "ended (exit code 1: EngineError: SGLang's scheduler_0 is gone, killed by SIGKILL)"
    assert any(gone in line for line in system.lines), "operators are told which process and how"
    assert answers == expected(whole + neighbours)
    after = system.runtime_pids("code")
    assert after["scheduler"] != before["scheduler"]
    assert not os.path.exists(f"/proc/{before['worker']}")


def test_a_device_that_fails_in_a_wake_fails_that_model_alone(system: System) -> None:
    """Its pages come back, others serve, and it starts again for the request that waits."""
    prompt, others = long_prompt(240, 30), [long_prompt(250 + i, 30) for i in range(2)]
    assert system.admin("sleep", "code").status_code == 200
    fails = system.run_dir.parent / FAILING_DEVICE
    with ThreadPoolExecutor(1) as pool:
        fails.write_text("code")
        try:
            future = pool.submit(system.generate, "code", prompt, NUM_TOKENS)
            wait_for("the wake to fail", lambda: system.status("code")["state"] == "failed")
            with system.ledger("host0") as ledger:
                assert not [o for o in ledger.owners() if o.name.startswith("code@") and o.alive]
            assert system.held("code", "weights") == system.held("code", "kv") == 0
            answers = [system.generate("chat", other, NUM_TOKENS)["output_ids"] for other in others]
        finally:
            fails.unlink()
        assert [*answers, future.result()["output_ids"]] == expected([*others, prompt])
    assert any("could not wake" in line and "Input/output error" in line for line in system.lines)
