"""What a sleeping 8B still holds on the card, part by part, against the bare CUDA context of a process.

    python -m benchmarks.gpu.residual [--quick]

Ours only: two 8B runtimes of one image in one ledger, one with decode graphs (to batch 32), one without, and a
process that does nothing but ``torch.zeros(1)``. Each engine is measured asleep as it started, then awake, then asleep
after real work. Figures are NVML's for each process, so the driver must show our process ids. Device time: about
2.5 minutes with the model in /dev/shm (80 s of them start-up); needs 45 GiB of card memory. Of the product:
``prism_sleep``, ``prism_wake``, and for torch's part its log line "beside pages N MiB, M of them torch's".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.card import Card
from benchmarks.gpu.children import SLEEP, WAKE_AND_WAIT, Engine
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.models import ensure_models
from benchmarks.gpu.nvml import GIB, card_used_mib, process_mib, settled_mib
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results, say

TARGET_MIB = 150
WORK = [Ask(1000 + n, 512, 64) for n in range(32)] + [Ask(2000, 4000, 8)]
TORCH = r"torch: [\d.]+ MiB reserved, ([\d.]+) allocated, ([\d.]+) in"  # scheduler_side.py
BESIDE = r"beside pages (\d+) MiB, (\d+) of them torch's"  # prism_sgl/engine/overhead.py


def held_mib(pids: Sequence[int]) -> float:
    return settled_mib(lambda: sum(process_mib(pids).values()))


def leased_mib(card: Card, engine: Engine) -> dict[str, float]:
    owner = next(o for o in card.ledger.owners() if o.name.startswith(f"{engine.name}@"))
    return {"weights": owner.weights * 2.0, "KV": owner.kv * 2.0, "overhead": owner.overhead * 2.0}


def tensors(engine: Engine, mark: int) -> list[str]:
    """The large ones: MiB, shape, type."""
    return [line for (line,) in engine.log_matches(r"torch: tensor (.*)", mark)]


def measure(card: Card, engine: Engine, label: str, results: Results, context: float) -> dict[str, float]:
    found: dict[str, float] = {}

    def add(what: str, mib: float, note: str = "", **more: Any) -> None:
        results.add(f"8B {label}: {what}", mib, context, "MiB", note=note, **more)

    engine.act(SLEEP)
    found["fresh"] = held_mib(engine.pids)
    add("asleep, has never served", found["fresh"])
    engine.act(WAKE_AND_WAIT)
    burst = engine.burst(WORK)
    if burst.errors:
        raise RuntimeError(f"a request failed: {burst.errors[0]}")
    leases = leased_mib(card, engine)
    awake = held_mib(engine.pids) - leases["weights"] - leases["KV"]
    add("awake after work, beside weights and KV", awake, note=f"leases: {leases} MiB")
    mark = engine.log_mark()
    engine.act(SLEEP)
    found["asleep"] = held_mib(engine.pids)
    leases = leased_mib(card, engine)
    beside = engine.log_matches(BESIDE, mark)
    add(
        "asleep after work",
        found["asleep"],
        target=f"context + {TARGET_MIB} MiB",
        met=found["asleep"] <= context + TARGET_MIB,
        note=f"{found['asleep'] - context:.0f} MiB more than a bare context; leases: {leases} MiB",
    )
    if beside:
        found["torch"] = float(beside[-1][1])
        add("asleep after work: reserved by torch", found["torch"])
    mark = engine.log_mark()
    engine.act({"name": "prism_tensors", "args": {"least_bytes": 4 << 20}})
    for allocated, in_tensors in engine.log_matches(TORCH, mark):
        add("torch's: in tensors of Python's", float(in_tensors), note="; ".join(tensors(engine, mark)))
        add("torch's: cuBLAS workspaces and the like", float(allocated) - float(in_tensors))
    say(f"{engine.name}: processes {process_mib(engine.pids)}")
    return found


def run(args: argparse.Namespace) -> None:
    results = open_results("residual")
    (model,) = ensure_models("llama8b")
    flags = {"max_total_tokens": 24_000, "context_length": 4096, "max_running_requests": 32}
    with Card(60 * GIB) as card:
        results.add("card before anything of ours", card_used_mib(), None, "MiB")
        bare = card.child("context")
        bare.send("context")
        with_graphs = card.ours("graphs", model, cuda_graph_max_bs_decode=32, **flags)
        engines = [(with_graphs, "with decode graphs to batch 32")]
        if not args.quick:
            without = card.ours("no-graphs", model, disable_cuda_graph=True, **flags)
            engines.append((without, "without graphs"))
        context = held_mib(bare.receive(120))
        results.add("bare CUDA context: a process with torch.zeros(1)", context, None, "MiB")
        bare.close()
        found: dict[str, dict[str, float]] = {}
        for engine, label in engines:
            with results.attempt(f"8B {label}"):
                engine.wait()
                found[engine.name] = measure(card, engine, label, results, context)
        with results.attempt("parts"):
            graphs, plain = found.get("graphs"), found.get("no-graphs")
            if graphs and plain:
                results.add("part: decode graphs", graphs["asleep"] - plain["asleep"], None, "MiB")
                results.add(
                    "part: libraries, kernels loaded on use, workspaces",
                    plain["asleep"] - context - plain.get("torch", 0.0),
                    None,
                    "MiB",
                    note="" if "torch" in plain else "torch's reserve included: the log does not tell it",
                )
                results.add("part: what serving leaves behind", plain["asleep"] - plain["fresh"], None, "MiB")
        results.add("card with all of these asleep", card_used_mib(), None, "MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the engine with graphs")
    parser.add_argument("--limit", type=float, default=270, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
