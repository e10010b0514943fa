"""What a sleeping 8B still holds on the card, part by part, against the bare CUDA context of a process.

    python -m benchmarks.gpu.residual [--quick]

Ours only: 8B runtimes of one image in one ledger: with decode graphs to batch 32, without graphs, with decode graphs to
batch 128 (overhead.py's), and with prefill graphs too; and two processes that do nothing but ``torch.zeros(1)``, one
with CUDA's own stacks, one with the smaller ones of our engines. The target is against CUDA's own; the parts begin with
the smaller ones, so that they add up. Each engine is measured asleep as it started, then awake, then asleep after real
work. Figures are NVML's for each process, so the driver must show our process ids. Device time: about 2.8 minutes with
the model in /dev/shm (80 s of them start-up; the last two engines load while the first are measured, and take the image
that these have made); needs 98 GiB of card memory, 76 without the prefill graphs, which a card of 80 GiB leaves out. Of
the product: ``prism_sleep``, ``prism_wake``, and for torch's part its log line "beside pages N MiB, M of them torch's".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.card import Card
from benchmarks.gpu.children import SLEEP, WAKE_AND_WAIT, Engine
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.models import ensure_models
from benchmarks.gpu.nvml import GIB, card_info, card_used_mib, process_mib, settled_mib
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results, say

TARGET_MIB = 150
_ENGINE_BYTES = 24 * GIB  # one 8B awake: weights, KV, all beside, and a step of loading
LAST_START_S = 90.0  # for an engine that began to load when the first was ready
TORCH = r"torch: [\d.]+ MiB reserved, ([\d.]+) allocated, ([\d.]+) in"  # scheduler_side.py
BESIDE = r"beside pages (\d+) MiB, (\d+) of them torch's"  # prism_sgl/engine/overhead.py


@dataclass(frozen=True)
class Kind:
    """One engine."""

    name: str
    label: str
    batch: int = 32
    flags: dict[str, Any] = field(default_factory=dict)
    has_target: bool = True

    def work(self) -> list[Ask]:
        """Fills the largest graph, and a prompt of full length."""
        return [Ask(1000 + n, 16384 // self.batch, 64) for n in range(self.batch)] + [Ask(2000, 4000, 8)]


FIRST = [
    Kind("graphs", "with decode graphs to batch 32", flags={"cuda_graph_max_bs_decode": 32}),
    Kind("no-graphs", "without graphs", flags={"disable_cuda_graph": True}),
]
LATER = [
    Kind("graphs128", "with decode graphs to batch 128", 128, {"cuda_graph_max_bs_decode": 128}),
    Kind(
        "prefill",
        "with decode graphs to batch 32 and prefill graphs",
        flags={"cuda_graph_max_bs_decode": 32, "disable_prefill_cuda_graph": False},
        has_target=False,
    ),
]


def held_mib(pids: Sequence[int]) -> float:
    return settled_mib(lambda: sum(process_mib(pids).values()))


def leased_mib(card: Card, engine: Engine) -> dict[str, float]:
    owner = card.owner(engine)
    return {"weights": owner.weights * 2.0, "KV": owner.kv * 2.0, "overhead": owner.overhead * 2.0}


def tensors(engine: Engine, mark: int) -> list[str]:
    """The largest blocks: MiB, shape and type of the largest tensor in each."""
    return [line for (line,) in engine.log_matches(r"torch: tensor (.*)", mark)]


@dataclass(frozen=True)
class Contexts:
    """MiB of bare ones."""

    default: float
    small_stacks: float


def measure(card: Card, engine: Engine, kind: Kind, results: Results, contexts: Contexts) -> dict[str, float]:
    found: dict[str, float] = {}
    context = contexts.default

    def add(what: str, mib: float, note: str = "", **more: Any) -> None:
        results.add(f"8B {kind.label}: {what}", mib, context, "MiB", note=note, **more)

    engine.act(SLEEP)
    found["fresh"] = held_mib(engine.pids)
    add("asleep, has never served", found["fresh"])
    engine.act(WAKE_AND_WAIT)
    burst = engine.burst(kind.work())
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
        target=f"context + {TARGET_MIB} MiB" if kind.has_target else "",
        met=found["asleep"] <= context + TARGET_MIB if kind.has_target else None,
        note=f"{found['asleep'] - context:.0f} MiB more than a bare context; leases: {leases} MiB",
    )
    results.add(
        f"8B {kind.label}: asleep after work, against a bare context with stacks as small",
        found["asleep"],
        contexts.small_stacks,
        "MiB",
        note=f"{found['asleep'] - contexts.small_stacks:.0f} MiB more",
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


def measure_contexts(card: Card, results: Results) -> Contexts:
    own, small = card.child("context"), card.child("context-small")
    own.send("context")
    small.send("context", small_stacks=True)
    found = Contexts(held_mib(own.receive(120)), held_mib(small.receive(120)))
    results.add("bare CUDA context: a process with torch.zeros(1)", found.default, None, "MiB")
    what = "bare CUDA context with the stacks of our engines (256 bytes a thread instead of 1 KiB)"
    results.add(what, found.small_stacks, found.default, "MiB")
    results.add("saved by smaller stacks", found.default - found.small_stacks, None, "MiB")
    own.close()
    small.close()
    return found


def report_parts(results: Results, contexts: Contexts, found: dict[str, dict[str, float]]) -> None:
    """Of the engine with decode graphs to batch 32, and what other graphs would add to it."""
    graphs, plain = found.get("graphs"), found.get("no-graphs")
    if graphs is None or plain is None:
        return
    torch_mib = plain.get("torch", 0.0)
    parts = {
        "context, with smaller stacks": contexts.small_stacks,
        "torch's reserve without graphs": torch_mib,
        "libraries, kernels loaded on use": plain["asleep"] - contexts.small_stacks - torch_mib,
        "decode graphs to batch 32": graphs["asleep"] - plain["asleep"],
    }
    for part, mib in parts.items():
        results.add(f"part: {part}", mib, None, "MiB")
    results.add(
        "parts together, against the engine with decode graphs to batch 32, asleep after work",
        sum(parts.values()),
        graphs["asleep"],
        "MiB",
        note="" if "torch" in plain else "torch's reserve is in the libraries: the log does not tell it",
    )
    left = plain["asleep"] - plain["fresh"]
    results.add("part of these parts: what serving leaves behind, without graphs", left, None, "MiB")
    for name, what in (
        ("graphs128", "decode graphs to batch 128 instead of 32"),
        ("prefill", "prefill graphs"),
    ):
        if more := found.get(name):
            results.add(f"part that is not in these: {what}", more["asleep"] - graphs["asleep"], None, "MiB")


def run(args: argparse.Namespace) -> None:
    results = open_results("residual")
    (model,) = ensure_models("llama8b")
    room = card_info().total_bytes // _ENGINE_BYTES
    first = FIRST[:1] if args.quick else FIRST
    later = [] if args.quick else LATER[: max(0, room - len(FIRST))]
    if not args.quick and len(later) < len(LATER):
        say(f"left out, for want of card memory: {', '.join(kind.label for kind in LATER[len(later) :])}")
    engines: list[tuple[Kind, Engine]] = []
    with Card((len(first) + len(later)) * _ENGINE_BYTES) as card:
        results.add("card before anything of ours", card_used_mib(), None, "MiB")

        def start(kind: Kind) -> None:
            flags = {
                "max_total_tokens": 48_000 if kind.batch > 32 else 24_000,
                "max_running_requests": kind.batch,
                **kind.flags,
            }
            engines.append((kind, card.ours(kind.name, model, **flags)))

        for kind in first:
            start(kind)
        card.only_prepare = True
        for kind in later:
            start(kind)
        contexts = measure_contexts(card, results)
        found: dict[str, dict[str, float]] = {}
        for number, (kind, engine) in enumerate(engines):
            with results.attempt(f"8B {kind.label}"):
                engine.wait(LAST_START_S if kind in LATER else 240.0)
            if not number:
                for _, waiting in engines[len(first) :]:
                    waiting.begin()
            with results.attempt(f"8B {kind.label}"):
                if engine.is_ready:
                    found[engine.name] = measure(card, engine, kind, results, contexts)
        with results.attempt("parts"):
            report_parts(results, contexts, found)
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
