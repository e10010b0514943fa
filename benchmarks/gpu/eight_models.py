"""examples/h100.toml from outside: eight models that do not fit together, 400 requests over HTTP, nothing lost.

    python -m benchmarks.gpu.eight_models [--requests 400] [--extra KEY=VALUE ...]

Makes the models, starts ``python -m prism_sgl.launch``, asks every model each of its questions while the others are
left alone, then asks all models at once, one question at a time each, so that batches are the same and greedy
tokens must be too. Needs a card with 45 GiB free and 16 cores; 5 minutes, of which the start is 3.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.launched import URL, ask, serving
from benchmarks.gpu.results import ROOT
from benchmarks.gpu.session import bounded, open_results, say
from demo.random_model import write_model

CONFIG = ROOT / "examples/h100.toml"
GEOMETRIES = {"large": "llama8b", "medium": "llama3b", "small": "llama1b"}


async def run(models: list[str], per_model: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=URL, timeout=120, limits=limits) as client:
        alone: dict[tuple[str, int], list[int]] = {}
        for model in models:
            for number in range(per_model):
                alone[model, number], _ = await ask(client, model, number)
            (
                await client.post(f"/api/v1/models/{model}/sleep")
            ).raise_for_status()  # no prefix is cached any more
        say(f"{len(alone)} answers of each model alone")
        lost: list[str] = []
        wrong: list[str] = []
        seconds: list[float] = []

        async def client_of(model: str) -> None:
            order = list(range(per_model))
            random.Random(model).shuffle(order)
            pause = random.Random(f"{model} pauses")
            for number in order:
                await asyncio.sleep(pause.expovariate(10))
                try:
                    tokens, took = await ask(client, model, number)
                except httpx.HTTPError as error:
                    lost.append(f"{model} {number}: {error!r}")
                    continue
                seconds.append(took)
                if tokens != alone[model, number]:
                    wrong.append(f"{model} {number}")

        before = sleeps((await client.get("/metrics")).text)
        began = time.monotonic()
        await asyncio.gather(*(client_of(model) for model in models))
        wall_s = time.monotonic() - began
        metrics = (await client.get("/metrics")).text
        # Cold in a running system: no process, no weights on the card; its image is still in host memory.
        (await client.post(f"/api/v1/models/{models[0]}/unload")).raise_for_status()
        cold_tokens, cold_s = await ask(client, models[0], 0)
        if cold_tokens != alone[models[0], 0]:
            wrong.append(f"{models[0]} 0 after a cold start")
    (Path(os.environ.get("OUT", "/tmp")) / "eight_models.metrics.txt").write_text(metrics)
    return {
        "lost": lost,
        "wrong": wrong,
        "seconds": sorted(seconds),
        "wall_s": wall_s,
        "cold_s": cold_s,
        "slept": {model: count - before.get(model, 0) for model, count in sleeps(metrics).items()},
    }


def sleeps(metrics: str) -> dict[str, int]:
    """How often each model went to sleep so far."""
    found = re.findall(r'^prism_model_sleeps_total\{model="([^"]+)"\} (\S+)', metrics, re.M)
    return {model: int(float(count)) for model, count in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--extra", nargs="*", default=[], help="engine_args for every model, as TOML")
    parser.add_argument("--seconds", type=float, default=560.0, help="give up after so long")
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT", "/tmp"))
    text = CONFIG.read_text()
    for extra in arguments.extra:  # for machines that lack something, such as an index for a kernel's sources
        text = text.replace("chunked_prefill_size", f"{extra}, chunked_prefill_size")
    config = out / "h100.toml"
    config.write_text(text)
    models = re.findall(r"^\[models\.(\S+)\]", text, re.M)
    with bounded(arguments.seconds):
        for model in models:
            write_model(GEOMETRIES[model.split("-")[0]], Path("/dev/shm/models") / model)
        results = open_results("eight_models")
        with serving(config, out / "eight_models.log") as start_s:
            seen = asyncio.run(run(models, arguments.requests // len(models)))
        answered = len(seen["seconds"])
        results.add("start of eight models", ours=start_s, peer=None, unit="s")
        results.add(
            f"answered of {arguments.requests}",
            ours=answered,
            peer=None,
            unit="requests",
            target=str(arguments.requests),
            met=not seen["lost"],
        )
        results.add(
            "answers that differ from the model alone",
            ours=len(seen["wrong"]),
            peer=None,
            unit="requests",
            target="0",
            met=not seen["wrong"],
        )
        results.add(
            "models that slept",
            ours=sum(1 for n in seen["slept"].values() if n),
            peer=None,
            unit="models",
            target=str(len(models)),
            met=all(seen["slept"].values()),
        )
        results.add("seconds of all requests together", ours=seen["wall_s"], peer=None, unit="s")
        results.add(
            "cold 8B in the running system: first answer",
            ours=seen["cold_s"],
            peer=None,
            unit="s",
            target="< 25 s",
            met=seen["cold_s"] < 25,
        )
        results.add("median seconds of a request", ours=seen["seconds"][answered // 2], peer=None, unit="s")
        results.add("99th percentile", ours=seen["seconds"][int(answered * 0.99)], peer=None, unit="s")
        say(f"lost {seen['lost'][:5]} wrong {seen['wrong'][:5]} slept {seen['slept']}")


if __name__ == "__main__":
    main()
