"""``python -m prism_sgl.launch`` from outside: started for a benchmark, and asked over HTTP."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.results import ROOT
from benchmarks.gpu.session import say

NEW_TOKENS = 16
URL = "http://127.0.0.1:30000"


class System:
    """The launcher, and what it printed."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "prism_sgl.launch", "--config", str(config)],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while "curl " not in self.text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"it did not become ready:\n{self.text()[-6000:]}")
            time.sleep(0.2)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def question(model: str, number: int) -> list[int]:
    """Token ids: 20 to 600, of which no two questions share a beginning."""
    chosen = random.Random(f"{model} {number}")
    return [number + 300, *chosen.choices(range(1000, 45000), k=chosen.randint(20, 600))]


async def ask(client: httpx.AsyncClient, model: str, number: int) -> tuple[list[int], float]:
    """(tokens, seconds); raises on any other answer than 200."""
    began = time.monotonic()
    reply = await client.post(
        f"/m/{model}/generate",
        json={
            "input_ids": question(model, number),
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        },
    )
    reply.raise_for_status()
    answer: dict[str, Any] = reply.json()
    return answer["output_ids"], time.monotonic() - began


@contextmanager
def serving(config: Path, log: Path) -> Iterator[float]:
    """The launcher, ready, until the end; the value is the seconds that its start took."""
    began = time.monotonic()
    system = System(config, log)
    try:
        system.wait_ready(400)
        start_s = time.monotonic() - began
        say(f"ready after {start_s:.0f} s")
        yield start_s
    finally:
        system.stop()
