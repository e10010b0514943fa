"""examples/h100.toml from outside: eight models that do not fit together, 400 requests over HTTP, nothing lost.

    python -m benchmarks.gpu.eight_models [--requests 400] [--extra KEY=VALUE ...]

Makes the models, starts ``python -m prism_sgl.launch``, asks every model each of its questions while the others are
left alone, then asks all models at once, one question at a time each, so that batches are the same and greedy
tokens must be too: two questions in one model would be one batch now and then, and a batch of two rounds otherwise in
bf16, which changes the tokens of random weights. Ends with 1 if a request was lost, an answer wrong, or a model never
slept. Needs a card with 45 GiB free and 16 cores; 5 minutes, of which the start is 3.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gpu.launched import URL, ask, serving
from benchmarks.gpu.results import ROOT, Results
from benchmarks.gpu.session import bounded, open_results, say
from benchmarks.gpu.stats import percentile
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
        cold_s = None
        try:
            (await client.post(f"/api/v1/models/{models[0]}/unload")).raise_for_status()
            cold_tokens, cold_s = await ask(client, models[0], 0)
            if cold_tokens != alone[models[0], 0]:
                wrong.append(f"{models[0]} 0 after a cold start")
        except httpx.HTTPError as error:
            lost.append(f"{models[0]} 0 after a cold start: {error!r}")
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


def report(results: Results, seen: dict[str, Any], models: list[str], requests: int) -> bool:
    """Nothing lost, nothing wrong, and every model slept."""
    seconds: list[float] = seen["seconds"]
    answered = len(seconds)
    slept = {model for model, count in seen["slept"].items() if count > 0}
    results.add(
        f"answered of {requests}",
        ours=answered,
        peer=None,
        unit="requests",
        target=str(requests),
        met=answered == requests,
        note="; ".join(seen["lost"][:5]),
    )
    results.add(
        "answers that differ from the model alone",
        ours=len(seen["wrong"]),
        peer=None,
        unit="requests",
        target="0",
        met=not seen["wrong"],
        note="; ".join(seen["wrong"][:5]),
    )
    results.add(
        "models that slept",
        ours=len(slept & set(models)),
        peer=None,
        unit="models",
        target=str(len(models)),
        met=slept == set(models),
        note=", ".join(f"{model} {count}" for model, count in sorted(seen["slept"].items())),
    )
    results.add("seconds of all requests together", ours=seen["wall_s"], peer=None, unit="s")
    cold_s: float | None = seen["cold_s"]
    results.add(
        "cold 8B in the running system: first answer",
        ours=cold_s,
        peer=None,
        unit="s",
        target="< 25 s",
        met=cold_s is not None and cold_s < 25,
    )
    for what, share in (("median seconds of a request", 0.5), ("99th percentile", 0.99)):
        results.add(what, ours=percentile(seconds, share) if seconds else None, peer=None, unit="s")
    return not seen["lost"] and not seen["wrong"] and answered == requests and slept == set(models)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=400, help="a multiple of the number of models")
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
    if not models or arguments.requests % len(models):
        parser.error(f"--requests {arguments.requests} does not divide by {len(models)} models")
    is_good = False
    with bounded(arguments.seconds):
        for model in models:
            write_model(GEOMETRIES[model.split("-")[0]], Path("/dev/shm/models") / model)
        results = open_results("eight_models")
        with serving(config, out / "eight_models.log") as start_s:
            seen = asyncio.run(run(models, arguments.requests // len(models)))
        results.add("start of eight models", ours=start_s, peer=None, unit="s")
        is_good = report(results, seen, models, arguments.requests)
    if not is_good:
        sys.exit(1)


if __name__ == "__main__":
    main()
