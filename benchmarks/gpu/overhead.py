"""What elastic memory costs an engine that is alone: ours against plain SGLang, 8B geometry, the same flags.

    python -m benchmarks.gpu.overhead [--quick] [--rounds 12] [--requests 150] [--load full|low]

Three engines stand on one card and start at once: ours, and plain SGLang twice. In each round all take a turn, each
idle while another is measured, in an order that rotates. The peer is both plain ones together; one against the other
says what the comparison can tell at all: where a model's weights happened to come to lie on the card is worth 0.7 % of
a decode step (docs/benchmarks.md), and percentiles are noisy.

Pools are equal, full of cached prefixes before the first round, and prompts differ in every round, so each request
evicts. Full load: a round is 128 requests at once, 192 in + 192 out. Low load: a round is one request, 512 in + 32 out.
The first rounds warm up and are not counted. Device time: about 6 minutes with the model in /dev/shm (80 s of them
start-up; a round of full load takes 11 s, of low load 0.8). Needs 74 GiB of card memory. A row is met when the worse
end of the 95 % interval over the rounds is within 0.5 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
from benchmarks.gpu.stats import Ratio, Samples, Statistic, mean, quantile, ratio_of_rounds

TARGET = 0.005
KV_TOKENS = 54_000  # 6.6 GiB of an 8B: a burst of full load does not fit beside the burst before


@dataclass(frozen=True)
class Load:
    """One kind of round."""

    name: str
    requests: int
    tokens_in: int
    tokens_out: int
    warm_up: int
    seed: int

    def asks(self, number: int) -> list[Ask]:
        """The same prompts for all engines of a round, others in every round."""
        first = self.seed + number * self.requests
        return [Ask(first + n, self.tokens_in, self.tokens_out) for n in range(self.requests)]

    @property
    def tokens(self) -> int:
        return self.requests * (self.tokens_in + self.tokens_out)


FULL = Load("full load, 128 x (192 in + 192 out)", 128, 192, 192, warm_up=2, seed=10_000_000)
LOW = Load("low load, one request at a time, 512 in + 32 out", 1, 512, 32, warm_up=5, seed=20_000_000)

# (name, seconds of a burst, of all of them)
TIMES: list[tuple[str, Callable[[Burst], list[float]], Statistic]] = [
    ("TTFT p50", lambda burst: burst.ttfts_s, quantile(0.5)),
    ("TTFT p99", lambda burst: burst.ttfts_s, quantile(0.99)),
    ("TPOT p50", lambda burst: burst.tpots_s, quantile(0.5)),
    ("TPOT p99", lambda burst: burst.tpots_s, quantile(0.99)),
]


def measure(engine: Engine, load: Load, number: int) -> Burst:
    burst = engine.burst(load.asks(number))
    if burst.errors:
        raise RuntimeError(
            f"{engine.name}: {len(burst.errors)} requests failed, the first: {burst.errors[0]}"
        )
    return burst


def report(results: Results, load: Load, bursts: dict[str, list[Burst]]) -> None:
    """``bursts``: of each engine, round by round."""

    def sides(of: Callable[[Burst], list[float]]) -> tuple[Samples, Samples, Samples, Samples]:
        ours, stock, twin = (
            np.array([of(burst) for burst in bursts[name]]) for name in ("ours", "stock", "twin")
        )
        return ours, np.concatenate((stock, twin), axis=1), stock, twin

    def add(
        name: str,
        values: tuple[float, float],
        unit: str,
        ratio: Ratio,
        control: Ratio,
        *,
        bigger_is_better: bool = False,
    ) -> None:
        what = f"{load.name}: {name}"
        results.add(
            what,
            *values,
            unit,
            ratio=ratio,
            target="worse end of the interval within 0.5 %",
            met=ratio.within(TARGET, bigger_is_better=bigger_is_better),
            note=f"{len(bursts['ours'])} rounds",
        )
        results.add(f"{what}, plain SGLang against itself", None, values[1], unit, ratio=control)

    ours, peers, stock, twin = sides(lambda burst: [burst.wall_s])
    add(
        "throughput, in + out",
        (load.tokens / mean(ours.ravel()), load.tokens / mean(peers.ravel())),
        "tokens/s",
        ratio_of_rounds(ours, peers, mean).inverse(),
        ratio_of_rounds(twin, stock, mean).inverse(),
        bigger_is_better=True,
    )
    for name, of, statistic in TIMES:
        ours, peers, stock, twin = sides(of)
        add(
            name,
            (statistic(ours.ravel()) * 1e3, statistic(peers.ravel()) * 1e3),
            "ms",
            ratio_of_rounds(ours, peers, statistic),
            ratio_of_rounds(twin, stock, statistic),
        )


def fill_cache(engine: Engine) -> None:
    length = 3500
    asks = [Ask(30_000_000 + n, length, 1) for n in range(KV_TOKENS // length + 1)]
    burst = engine.burst(asks)
    assert not burst.errors, burst.errors[0]


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


def compare(results: Results, engines: dict[str, Engine], load: Load, rounds: int) -> None:
    bursts: dict[str, list[Burst]] = {name: [] for name in engines}
    say_each = max(1, rounds // 6)
    for number in range(rounds + load.warm_up):
        order = [*engines.items()]
        order = order[number % len(order) :] + order[: number % len(order)]
        with results.attempt(f"{load.name}, round {number}"):
            measured = {name: measure(engine, load, number) for name, engine in order}
            if number >= load.warm_up:
                for name, burst in measured.items():
                    bursts[name].append(burst)
            if number % say_each == 0:
                walls = ", ".join(f"{name} {measured[name].wall_s:.3f} s" for name in engines)
                say(f"{load.name}, round {number}: {walls}")
        if bursts["ours"] and len(bursts["ours"]) % (2 * say_each) == 0:  # in case time runs out
            report(results, load, bursts)
    with results.attempt(load.name):
        report(results, load, bursts)


def run(args: argparse.Namespace) -> None:
    results = open_results("overhead")
    (model,) = ensure_models("llama8b")
    flags = {
        "max_total_tokens": KV_TOKENS,
        "max_running_requests": FULL.requests,
        "cuda_graph_max_bs_decode": FULL.requests,
        "log_level": "warning",
    }
    kv_bytes = KV_TOKENS * KV_BYTES_PER_TOKEN["llama8b"]
    with Card(16 * GIB + kv_bytes + 10 * GIB) as card:
        ours = card.ours("ours", model, ceiling_bytes=kv_bytes + GIB, **flags)
        stock = card.stock("stock", model, **flags)
        twin = card.stock("twin", model, **flags)
        engines = {engine.name: engine for engine in (ours, stock, twin)}
        with results.attempt("start of all engines"):
            wait_all([*engines.values()])
        if not all(engine.is_ready for engine in engines.values()):
            return
        for name, values in different_flags(ours, stock).items():
            say(f"flag {name}: ours {values[0]}, stock {values[1]}")
        with results.attempt("greedy answers equal to stock"):
            same_tokens(ours, stock, results)
        for engine in engines.values():
            fill_cache(engine)
        if args.load != "low":
            compare(results, engines, FULL, args.rounds)
        if args.load != "full":
            compare(results, engines, LOW, args.requests)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three rounds, fifteen requests")
    parser.add_argument("--rounds", type=int, default=12, help="of full load")
    parser.add_argument("--requests", type=int, default=150, help="rounds of low load")
    parser.add_argument("--load", choices=("full", "low"), help="only this one")
    parser.add_argument("--limit", type=float, default=400, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.requests = 3, 15
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
