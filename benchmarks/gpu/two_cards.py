"""Models that move between two cards while they are asked: nothing lost, no other answer, and what a move costs.

    python -m benchmarks.gpu.two_cards [--rounds 2] [--host-model FOLDER]

An 8B and two 1B of random weights on two cards with room for all on either, each with a spare on the other card, as is
the default. Each model answers its questions alone first; then all are asked again and again, one question at a time
each so that greedy tokens must be the same, while each is moved to the other card and back. Needs two cards with 40 GiB
free each and 16 cores; 4 minutes, of which the start is 2. ``--host-model``: the same with one small model on two host
devices, to try the script without a card.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.launched import URL, ask, serving
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results, say
from benchmarks.gpu.stats import percentile
from demo.random_model import write_model

CARDS = {"large": "llama8b", "small-1": "llama1b", "small-2": "llama1b"}
HEAD = """
[server]
port = 30000
[scheduler]
start_parallel = 4
sleep_after = "10m"
spares = true
"""
DEVICE = """
[[devices]]
name = "{name}"
kind = "{kind}"
index = {index}
memory = "{memory}"
"""
MODEL = """
[models.{name}]
path = "{path}"
engine_args = {{ {args} }}
"""
QUESTIONS = 12
PAUSE_S = 0.05  # between two questions of a model: its queue stays short, so a move is what a request feels
AFTER_A_MOVE_S = 1.0


@dataclass
class Seen:
    """What the clients saw."""

    alone: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answers: list[tuple[str, float, float]] = field(default_factory=list)  # model, began, ended
    moves: list[tuple[str, float, float]] = field(default_factory=list)

    def seconds(self, *, caught: bool) -> list[float]:
        """Of answers whose model moved while they were asked, or of all others."""
        return [
            ended - began
            for model, began, ended in self.answers
            if caught
            is any(
                moved == model and began < move_end and move_began < ended
                for moved, move_began, move_end in self.moves
            )
        ]


async def told(client: httpx.AsyncClient, model: str) -> dict[str, Any]:
    status: dict[str, Any] = (await client.get(f"/api/v1/models/{model}")).json()
    return status


def leaving(status: dict[str, Any]) -> list[str]:
    """Devices where a runtime of the model is about to end."""
    return [other["device"] for other in status["others"] if other["role"] == "leaving"]


async def keep_asking(client: httpx.AsyncClient, model: str, seen: Seen, done: asyncio.Event) -> None:
    number = 0
    while not done.is_set():
        began = time.monotonic()
        try:
            tokens, _ = await ask(client, model, number)
        except httpx.HTTPError as error:
            seen.lost.append(f"{model} {number}: {error!r}")
        else:
            seen.answers.append((model, began, time.monotonic()))
            if tokens != seen.alone[model, number]:
                seen.wrong.append(f"{model} {number}")
        number = (number + 1) % QUESTIONS
        await asyncio.sleep(PAUSE_S)


async def move_all(client: httpx.AsyncClient, devices: list[str], models: list[str], seen: Seen) -> None:
    for model in models:
        source = (await told(client, model))["device"]
        (target,) = [device for device in devices if device != source]
        began = time.monotonic()
        reply = await client.post(f"/api/v1/models/{model}/move?device={target}")
        seen.moves.append((model, began, time.monotonic()))
        if reply.is_error:
            seen.lost.append(f"move of {model} to {target}: {reply.status_code} {reply.text[:200]}")
        moved_s = time.monotonic() - began
        # The source ends what it has, then it is stopped or sleeps as a spare.
        while source in leaving(status := await told(client, model)):  # noqa: ASYNC110 (asking is all there is)
            await asyncio.sleep(0.1)
        say(f"{model}: {source} to {status['device']} in {moved_s:.2f} s")
        await asyncio.sleep(AFTER_A_MOVE_S)


async def run(devices: list[str], models: list[str], rounds: int) -> Seen:
    seen = Seen()
    done = asyncio.Event()
    async with httpx.AsyncClient(base_url=URL, timeout=120) as client:
        for model in models:
            for number in range(QUESTIONS):
                seen.alone[model, number], _ = await ask(client, model, number)
        say(f"{len(seen.alone)} answers of each model alone")
        clients = [asyncio.create_task(keep_asking(client, model, seen, done)) for model in models]
        try:
            await asyncio.sleep(AFTER_A_MOVE_S)
            for _ in range(2 * rounds):
                await move_all(client, devices, models, seen)
        finally:
            done.set()
            await asyncio.gather(*clients)
        (Path(os.environ.get("OUT", "/tmp")) / "two_cards.metrics.txt").write_text(
            (await client.get("/metrics")).text
        )
    return seen


def report(results: Results, seen: Seen) -> None:
    results.add("moves under load", len(seen.moves), None, "moves")
    results.add("a move, median", statistics.median(e - b for _, b, e in seen.moves), None, "s")
    results.add("a move, longest", max(e - b for _, b, e in seen.moves), None, "s")
    total = len(seen.answers) + len(seen.lost)
    results.add("lost", len(seen.lost), None, f"of {total}", target="0", met=not seen.lost)
    what = "answers that differ from the model alone"
    results.add(what, len(seen.wrong), None, f"of {total}", target="0", met=not seen.wrong)
    caught, others = seen.seconds(caught=True), seen.seconds(caught=False)
    results.add("requests caught in a move of their model", len(caught), None, f"of {total}")
    for share in (0.5, 0.99):
        if caught and others:
            what = f"seconds of a request, p{share * 100:.0f}: caught in a move, against others"
            results.add(what, percentile(caught, share), percentile(others, share), "s")
    say(f"lost {seen.lost[:5]} wrong {seen.wrong[:5]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="each moves every model there and back")
    parser.add_argument("--host-model", type=Path, help="a small model's folder: no card is used")
    parser.add_argument("--extra", nargs="*", default=[], help="engine_args for every model, as TOML")
    parser.add_argument("--limit", type=float, default=400, help="seconds, then it gives up")
    args = parser.parse_args()
    out = Path(os.environ.get("OUT", "/tmp"))
    kind, memory = ("host", "900MiB") if args.host_model else ("cuda", "40GiB")
    devices = [f"{kind}{index}" for index in range(2)]
    engine_args = ["context_length = 1024", "max_running_requests = 8", *args.extra]
    models = (
        {"small": args.host_model} if args.host_model else {n: Path("/dev/shm/models") / n for n in CARDS}
    )
    text = HEAD + "".join(
        DEVICE.format(name=name, kind=kind, index=index, memory=memory) for index, name in enumerate(devices)
    )
    text += "".join(
        MODEL.format(name=name, path=path, args=", ".join(engine_args)) for name, path in models.items()
    )
    config = out / "two_cards.toml"
    config.write_text(text)
    with bounded(args.limit):
        if not args.host_model:
            for name, geometry in CARDS.items():
                write_model(geometry, models[name])
        results = open_results("two_cards")
        with serving(config, out / "two_cards.log"):
            report(results, asyncio.run(run(devices, [*models], args.rounds)))


if __name__ == "__main__":
    main()
