"""Serve examples/demo.toml. With ``--once``: ask each model, show who held what memory, stop.

``--once`` ends with 1 unless the workers' own logs show a sleep, a wake and a reclaim for a neighbour.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from prism_sgl.config import Config, load, log_dir
from prism_sgl.launch.banner import base_url
from prism_sgl.units import show_size

CONFIG = Path(__file__).parents[1] / "examples" / "demo.toml"
READY = "try: curl"
QUESTIONS = {
    "chat": "What is the capital of France?",
    "code": "Write a Python line that prints hello.",
    "poet": "Write two lines about the sea.",
}
# Texts read at the same time, more than fit into a floor: so many of them fill a model's KV, and the next model
# has to ask its neighbour for memory.
NUM_LONG_TEXTS = {"chat": 3, "code": 3}
LONG_TEXT_WORDS = 1100
PROOFS = {
    "a sleep": re.compile(r"\bsleep: gave back (?!0 MiB)"),
    "a wake": re.compile(r"\bwake: (?!0 MiB)\d+ MiB of weights mapped"),
    "a reclaim by another owner": re.compile(
        r"\breclaim: gave \d+ MiB (back to neighbours|of sleeping weights back)"
    ),
}
ANSWER_TIMEOUT_S = 300.0


class Snapshots:
    """Who held what, at moments with a title."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._taken: list[tuple[str, dict[str, Any]]] = []

    def take(self, title: str) -> None:
        self._taken.append((title, self._client.get("/api/v1/models").raise_for_status().json()))

    def table(self, config: Config) -> Table:
        budget = sum(device.memory_bytes for device in config.devices)
        table = Table(title=f"who held what of {show_size(budget)} (weights + KV)")
        table.add_column("when")
        for name in config.models:
            table.add_column(name, justify="right")
        table.add_column("held", justify="right")
        for title, content in self._taken:
            models = {model["name"]: model for model in content["models"]}
            held = sum(int(m["weights_bytes"]) + int(m["kv_bytes"]) for m in models.values())
            table.add_row(title, *(_cell(models[name]) for name in config.models), show_size(held))
        return table


def _cell(model: dict[str, Any]) -> str:
    return f"{model['state']} {show_size(int(model['weights_bytes']))} + {show_size(int(model['kv_bytes']))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="ask each model one question, then stop")
    parser.add_argument("--config", type=Path, default=CONFIG)
    given = parser.parse_args()
    config = load(given.config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped with us
    server = subprocess.Popen(
        [sys.executable, "-m", "prism_sgl.launch", "--config", str(given.config)],
        stdout=subprocess.PIPE if given.once else None,
        text=True,
        start_new_session=given.once,
    )
    try:
        if not given.once:
            return wait(server)
        if not echo_until_ready(server):
            print("demo: the server did not become ready", file=sys.stderr)
            return 1
        # The pipe has to be read on, or the server would block on a full one.
        threading.Thread(target=lambda: [print(line, end="") for line in lines(server)], daemon=True).start()
        return tour(config)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def wait(server: subprocess.Popen[str]) -> int:
    """Until the user's ^C, which reaches the server too."""
    while True:
        try:
            return server.wait()
        except KeyboardInterrupt:
            continue


def lines(server: subprocess.Popen[str]) -> Iterator[str]:
    assert server.stdout is not None
    # Not "yield from": the end of this generator would close the pipe, and it is read again later.
    for line in server.stdout:  # noqa: UP028
        yield line


def echo_until_ready(server: subprocess.Popen[str]) -> bool:
    for line in lines(server):
        print(line, end="", flush=True)
        if line.startswith(READY):
            return True
    return False


def tour(config: Config) -> int:
    console = Console()
    with httpx.Client(base_url=base_url(config), timeout=ANSWER_TIMEOUT_S) as client:
        snapshots = Snapshots(client)
        snapshots.take("before")
        for model, num in NUM_LONG_TEXTS.items():
            if model in config.models:
                with ThreadPoolExecutor(num) as pool:
                    list(pool.map(partial(read_long_text, client, model), range(num)))
                snapshots.take(f"{model} has read {num} texts")
        for model in config.models:
            question = QUESTIONS.get(model, QUESTIONS["chat"])
            print(f"\n{model} <- {question}", flush=True)
            print(f"{model} -> {answer(client, snapshots, model, question)}", flush=True)
        snapshots.take("after")
    console.print(snapshots.table(config))
    return prove(Path(log_dir(config)))


def read_long_text(client: httpx.Client, model: str, number: int) -> None:
    """One prompt of many tokens that shares no beginning with the others, and one token of answer."""
    text = " ".join(str(number * LONG_TEXT_WORDS + word) for word in range(LONG_TEXT_WORDS // 3))
    client.post("/v1/completions", json={"model": model, "prompt": text, "max_tokens": 1}).raise_for_status()


def answer(client: httpx.Client, snapshots: Snapshots, model: str, question: str) -> str:
    """The whole answer; the memory is looked at when its first piece has come."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 48}
    pieces: list[str] = []
    with client.stream(
        "POST", "/v1/chat/completions", json={**body, "stream": True, "temperature": 0}
    ) as stream:
        if stream.is_error:
            stream.read()
            raise SystemExit(f"demo: {model} answered {stream.status_code}: {stream.text}")
        for piece in contents(stream.iter_lines()):
            if not pieces:
                snapshots.take(f"{model} answers")
            pieces.append(piece)
    return "".join(pieces).strip()


def contents(stream: Iterator[str]) -> Iterator[str]:
    for line in stream:
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        for choice in json.loads(data).get("choices", []):
            if text := choice.get("delta", {}).get("content"):
                yield text


def prove(logs: Path) -> int:
    found = dict.fromkeys(PROOFS, "")
    for log in sorted(logs.glob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            for what, pattern in PROOFS.items():
                if not found[what] and pattern.search(line):
                    found[what] = f"{log.stem}: {line}"
    for what, line in found.items():
        print(f"{what}: {line or 'NOT SEEN'}")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
