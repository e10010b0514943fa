"""What elastic memory costs an engine that is alone: ours against plain SGLang, 8B geometry, the same flags.

    python -m benchmarks.gpu.overhead [--quick] [--pairs 7]

Both engines stand on one card and start at once; they take turns, A B then B A, each idle while the other is
measured. Pools are equal, prompts differ in every burst, so that the prefix cache is full and evicting from the third
burst on. Low load: requests of 512 in + 64 out one after the other. Full load: 128 at once, 256 in + 256 out. The
first pair of each warms up and is not counted. Device time: about 4 minutes with the model in /dev/shm (90 s of them
start-up; a pair takes 17 s). Needs 70 GiB of card memory (two 8B with 12 GiB of KV each). A row is met when the worse
end of the 95 % interval over the pairs is within 0.5 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.harness import (
    GIB,
    KV_BYTES_PER_TOKEN,
    Burst,
    Card,
    Engine,
    bounded,
    different_flags,
    ensure_models,
    open_results,
    say,
    wait_all,
)
from benchmarks.gpu.results import Results
from benchmarks.gpu.stats import percentile, ratio_of_pairs

TARGET = 0.005
KV_TOKENS = 96_000  # 12 GiB of an 8B: a burst of 65,536 does not fit beside the burst before
FULL_REQUESTS = 128

# (name, of a burst, bigger is better, unit)
METRICS: list[tuple[str, Callable[[Burst], float], bool, str]] = [
    ("throughput, in + out", lambda b: _tokens(b) / b.wall_s, True, "tokens/s"),
    ("TTFT p50", lambda b: percentile(b.ttfts_s, 0.5) * 1e3, False, "ms"),
    ("TTFT p99", lambda b: percentile(b.ttfts_s, 0.99) * 1e3, False, "ms"),
    ("TPOT p50", lambda b: percentile(b.tpots_s, 0.5) * 1e3, False, "ms"),
    ("TPOT p99", lambda b: percentile(b.tpots_s, 0.99) * 1e3, False, "ms"),
]


def _tokens(burst: Burst) -> int:
    prompt_tokens: int = sum(answer["prompt_tokens"] for answer in burst.answers)
    return burst.new_tokens + prompt_tokens


def asks(load: str, pair: int, num_low: int) -> list[Ask]:
    """The same prompts for both engines of a pair, others in every pair."""
    base = (pair + 1) * 100_000
    if load == "low":
        return [Ask(base + n, 512, 64) for n in range(num_low)]
    return [Ask(base + 50_000 + n, 256, 256) for n in range(FULL_REQUESTS)]


def measure(engine: Engine, load: str, pair: int, num_low: int) -> Burst:
    requests = asks(load, pair, num_low)
    burst = engine.burst(requests, one_by_one=load == "low")
    if burst.errors:
        raise RuntimeError(
            f"{engine.name}: {len(burst.errors)} requests failed, the first: {burst.errors[0]}"
        )
    for request, answer in zip(requests, burst.answers, strict=True):
        answer["prompt_tokens"] = request.tokens
    return burst


def report(results: Results, load: str, bursts: dict[str, list[Burst]]) -> None:
    label = (
        "low load, one request at a time, 512 in + 64 out"
        if load == "low"
        else f"full load, {FULL_REQUESTS} x (256 in + 256 out)"
    )
    num_pairs = min(len(bursts["ours"]), len(bursts["stock"]))
    for name, of, bigger_is_better, unit in METRICS:
        ours = [of(burst) for burst in bursts["ours"][:num_pairs]]
        stock = [of(burst) for burst in bursts["stock"][:num_pairs]]
        ratio = ratio_of_pairs(ours, stock)
        results.add(
            f"{label}: {name}",
            sum(ours) / num_pairs,
            sum(stock) / num_pairs,
            unit,
            ratio=ratio,
            target="worse end of the interval within 0.5 %",
            met=ratio.within(TARGET, bigger_is_better=bigger_is_better),
            note=f"{num_pairs} pairs, ratios "
            + " ".join(f"{mine / theirs:.4f}" for mine, theirs in zip(ours, stock, strict=True)),
        )


def same_tokens(ours: Engine, stock: Engine, results: Results) -> None:
    """Greedy answers, one at a time so that both run the same batches; the second round has its prefix cached."""
    questions = [Ask(10 + n, 20 + 90 * n, 32) for n in range(6)]
    for round_name in ("fresh", "from the prefix cache"):
        mine = ours.burst(questions, keep_ids=True, one_by_one=True)
        theirs = stock.burst(questions, keep_ids=True, one_by_one=True)
        same = sum(a == b for a, b in zip(mine.ids, theirs.ids, strict=True))
        cached = sum(answer["cached"] for answer in mine.answers)
        results.add(
            f"greedy answers equal to stock, {round_name}",
            float(same),
            float(len(questions)),
            "answers",
            target="all",
            met=same == len(questions),
            note=f"{cached} prompt tokens cached at ours",
        )


def run(args: argparse.Namespace) -> None:
    results = open_results("overhead")
    (model,) = ensure_models("llama8b")
    flags = {
        "max_total_tokens": KV_TOKENS,
        "max_running_requests": FULL_REQUESTS,
        "cuda_graph_max_bs_decode": FULL_REQUESTS,
        "log_level": "warning",
    }
    kv_bytes = KV_TOKENS * KV_BYTES_PER_TOKEN["llama8b"]
    with Card(16 * GIB + kv_bytes + 10 * GIB) as card:
        ours = card.ours("ours", model, ceiling_bytes=kv_bytes + GIB, **flags)
        stock = card.stock("stock", model, **flags)
        with results.attempt("start of both engines"):
            wait_all([ours, stock])
        if not (ours.is_ready and stock.is_ready):
            return
        for name, values in different_flags(ours, stock).items():
            say(f"flag {name}: ours {values[0]}, stock {values[1]}")
        with results.attempt("greedy answers equal to stock"):
            same_tokens(ours, stock, results)
        loads = ("full", "low") if not args.load else (args.load,)
        bursts: dict[str, dict[str, list[Burst]]] = {load: {"ours": [], "stock": []} for load in loads}
        for pair in range(args.pairs + 1):
            for load in loads:
                order = [("ours", ours), ("stock", stock)]
                with results.attempt(f"pair {pair}, {load} load"):
                    measured = {
                        who: measure(engine, load, pair, args.low_requests)
                        for who, engine in (order if pair % 2 else order[::-1])
                    }
                    for who, burst in measured.items():
                        if pair:
                            bursts[load][who].append(burst)
                        say(
                            f"pair {pair} {load:4} {who:5}: {_tokens(burst) / burst.wall_s:9.1f} tokens/s, "
                            f"TTFT p50 {percentile(burst.ttfts_s, 0.5) * 1e3:7.2f} ms, "
                            f"TPOT p50 {percentile(burst.tpots_s, 0.5) * 1e3:6.3f} ms"
                        )
            if pair == args.pairs or (pair and pair % 3 == 0):  # now and then, in case time runs out
                for load in loads:
                    if bursts[load]["ours"]:
                        report(results, load, bursts[load])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two pairs")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--low-requests", type=int, default=8, help="of a low-load burst, about 0.5 s each")
    parser.add_argument("--load", choices=("low", "full"))
    parser.add_argument("--limit", type=float, default=330, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    if args.quick:
        args.pairs = 2
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
