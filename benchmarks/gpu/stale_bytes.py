"""Whether answers depend on what lies in KV pages before anything is written there.

    python -m benchmarks.gpu.stale_bytes

A 1B of ours for each attention backend and kind of KV. Each answers with new pages full of zeros, as in the product,
sleeps so that all pages go, and answers again with new pages full of 0xFF: NaN in bf16 and in fp8. A kernel that reads
rows of a block which nobody has written yet, and weighs them with zero instead of leaving them out, answers otherwise.
No target: the product gives no page that is not zero (``gives_zeroed_memory``), and this says how much rests on that.
Not beside a test, because the outcome is a fact about the kernels. Device time: about 90 s with the model in /dev/shm,
nearly all of it start-up; needs 24 GiB of card memory.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.gpu.card import Card
from benchmarks.gpu.children import SLEEP, WAKE_AND_WAIT, Action, Engine
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.installed import attention_backend
from benchmarks.gpu.models import ensure_models
from benchmarks.gpu.nvml import GIB
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results

KINDS: dict[str, dict[str, Any]] = {
    "fa3": {"attention_backend": "fa3"},
    "fa3, blocks of 64, fp8 KV": {"attention_backend": "fa3", "page_size": 64, "kv_cache_dtype": "fp8_e4m3"},
    "triton, blocks of 16": {"attention_backend": "triton", "page_size": 16},
    "flashinfer": {"attention_backend": "flashinfer"},
}
QUESTIONS = [Ask(seed=1 + n, tokens=tokens, new_tokens=24) for n, tokens in enumerate((3, 60, 700, 3000))]


def fill(byte: int) -> Action:
    return {"name": "prism_fill", "args": {"byte": byte}}


def measure(engine: Engine, what: str, results: Results) -> None:
    answers = []
    for byte in (0x00, 0xFF):
        engine.act(SLEEP)
        engine.act(fill(byte))
        engine.act(WAKE_AND_WAIT)
        answers.append(engine.greedy(QUESTIONS))
    zeros, stale = answers
    results.add(
        f"{what}: greedy answers the same with new KV pages full of NaN",
        float(sum(one == other for one, other in zip(stale, zeros, strict=True))),
        float(len(zeros)),
        "answers",
        note="peer: all, with pages of zeros",
    )


def run() -> None:
    results = open_results("stale_bytes")
    (model,) = ensure_models("llama1b")
    kinds = {
        what: flags
        for what, flags in KINDS.items()
        if flags["attention_backend"] != "fa3" or attention_backend() == "fa3"
    }
    with Card(10 * GIB * len(kinds)) as card:
        engines = {}
        for number, (what, flags) in enumerate(kinds.items()):
            shared = {"max_running_requests": 8, "cuda_graph_max_bs_decode": 8, **flags}
            engines[what] = card.ours(f"stale{number}", model, ceiling_bytes=GIB, **shared)
        for what, engine in engines.items():
            with results.attempt(what):
                engine.wait()
                measure(engine, what, results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=150, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    with bounded(args.limit):
        run()


if __name__ == "__main__":
    main()
