"""What elastic memory costs an engine that is alone: ours against plain SGLang, 8B geometry, the same flags.

    python -m benchmarks.gpu.overhead [--quick] [--rounds 12] [--requests 150] [--load full|low]

Several engines stand on one card and start at once: plain SGLang twice, ours twice (at full load once, where the card
has 80 GiB). In each round all take a turn, each idle while another is measured, in an order that rotates, and all on
the same cores (cores.py). Engines of a kind count together; one against the other says what the comparison can tell at
all: where a model's weights happened to come to lie on the card is worth 0.7 % of a decode step (docs/benchmarks.md),
and percentiles are noisy.

Pools are equal, full of cached prefixes before the first round, and prompts differ in every round, so each request
evicts. Full load: a round is 128 requests at once, 192 in + 192 out. Low load: a round is one request, 512 in + 32 out.
The first rounds warm up and are not counted. Device time: 8 minutes with the model in /dev/shm (80 s of start-up for
each load; a round of full load takes 11 s, of low load 1 s). Needs 77 GiB of card memory, 99 for four engines at full
load. A row is met when the worse end of the 95 % interval over the rounds is within 0.5 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.gpu.card import Card
from benchmarks.gpu.children import Burst, Engine, different_flags, wait_all
from benchmarks.gpu.cores import share_cores
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.models import KV_BYTES_PER_TOKEN, ensure_models
from benchmarks.gpu.nvml import GIB, card_info
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results, say
from benchmarks.gpu.stats import Ratio, Samples, Statistic, mean, quantile, ratio_of_rounds

TARGET = 0.005
_BESIDE_KV_BYTES = 18 * GIB  # of one 8B: weights, context, graphs, the activations of a prefill


@dataclass(frozen=True)
class Load:
    """One kind of round, and the engines for it."""

    name: str
    requests: int
    tokens_in: int
    tokens_out: int
    warm_up: int
    seed: int
    kv_tokens: int  # a round does not fit beside the one before, or many
    ours: tuple[str, ...] = ("ours", "ours-again")
    stock: tuple[str, ...] = ("stock", "stock-again")

    def asks(self, number: int) -> list[Ask]:
        """The same prompts for all engines of a round, others in every round."""
        first = self.seed + number * self.requests
        return [Ask(first + n, self.tokens_in, self.tokens_out) for n in range(self.requests)]

    @property
    def tokens(self) -> int:
        return self.requests * (self.tokens_in + self.tokens_out)


FULL = Load(
    "full load, 128 x (192 in + 192 out)",
    *(128, 192, 192),
    warm_up=2,
    seed=10_000_000,
    kv_tokens=54_000,
)
LOW = Load(
    "low load, one request at a time, 512 in + 32 out",
    *(1, 512, 32),
    warm_up=5,
    seed=20_000_000,
    kv_tokens=9_000,
)


def measure(engine: Engine, load: Load, number: int) -> Burst:
    burst = engine.burst(load.asks(number))
    if burst.errors:
        raise RuntimeError(
            f"{engine.name}: {len(burst.errors)} requests failed, the first: {burst.errors[0]}"
        )
    return burst


def report(results: Results, load: Load, bursts: dict[str, list[Burst]]) -> None:
    """``bursts``: of each engine, round by round."""
    rounds = len(bursts[load.ours[0]])

    def compare(
        name: str,
        unit: str,
        of: Callable[[Burst], list[float]],
        statistic: Statistic,
        *,
        has_target: bool = True,
    ) -> None:
        """``of``: seconds of a burst; those of a rate, if the unit is one."""
        samples = {engine: np.array([of(burst) for burst in mine]) for engine, mine in bursts.items()}
        ours = np.concatenate([samples[engine] for engine in load.ours], axis=1)
        peers = np.concatenate([samples[engine] for engine in load.stock], axis=1)
        is_rate = unit == "tokens/s"

        def ratio(one: Samples, other: Samples) -> Ratio:
            seconds = ratio_of_rounds(one, other, statistic)
            return seconds.inverse() if is_rate else seconds

        def value(side: Samples) -> float:
            seconds = float(statistic(side.ravel()))
            return load.tokens / seconds if is_rate else seconds * 1e3

        what, found = f"{load.name}: {name}", ratio(ours, peers)
        quarters = "; ".join(
            f"{engine} "
            + " ".join(f"{quarter * 1e3:.2f}" for quarter in np.quantile(mine, (0.25, 0.5, 0.75)))
            for engine, mine in samples.items()
        )
        results.add(
            what,
            value(ours),
            value(peers),
            unit,
            ratio=found,
            target="worse end of the interval within 0.5 %" if has_target else "",
            met=found.within(TARGET, bigger_is_better=is_rate) if has_target else None,
            note=f"{rounds} rounds; quartiles, ms: {quarters}",
        )
        for kind, names in (("plain SGLang", load.stock), ("ours", load.ours)):
            if len(names) == 2:
                one, other = (samples[engine] for engine in names)
                results.add(f"{what}, {kind} against itself", None, None, "", ratio=ratio(other, one))

    compare("throughput, in + out", "tokens/s", lambda burst: [burst.wall_s], mean)
    if load.requests > 1:
        # The first prefill takes what has arrived: where these differ, TTFT does, whoever holds the memory.
        last = "the last request is handed over, after the first"
        compare(last, "ms", lambda burst: [burst.handed_over_s], mean, has_target=False)
    for share in (0.5, 0.99):
        compare(f"TTFT p{share * 100:.0f}", "ms", lambda burst: burst.ttfts_s, quantile(share))
        compare(f"TPOT p{share * 100:.0f}", "ms", lambda burst: burst.tpots_s, quantile(share))


def fill_cache(engine: Engine, kv_tokens: int) -> None:
    length = 1000
    asks = [Ask(30_000_000 + n, length, 1) for n in range(kv_tokens // length + 1)]
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


def take_turns(results: Results, engines: dict[str, Engine], load: Load, rounds: int) -> None:
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
        if number > load.warm_up and number % (2 * say_each) == 0:  # in case time runs out
            report(results, load, bursts)
    with results.attempt(load.name):
        report(results, load, bursts)


def fitting(load: Load, card_bytes: int, engine_bytes: int) -> Load:
    """With the second engine of ours only where four of them have the room."""
    engines = len(load.ours) + len(load.stock)
    return load if engines * engine_bytes <= card_bytes else replace(load, ours=load.ours[:1])


def measure_load(results: Results, model: Path, load: Load, rounds: int) -> None:
    flags = {
        "max_total_tokens": load.kv_tokens,
        "max_running_requests": max(load.requests, 8),
        "cuda_graph_max_bs_decode": max(load.requests, 8),
        "log_level": "warning",
    }
    kv_bytes = load.kv_tokens * KV_BYTES_PER_TOKEN["llama8b"]
    load = fitting(load, card_info().total_bytes, kv_bytes + _BESIDE_KV_BYTES)
    with Card(len(load.ours) * (16 * GIB + kv_bytes + 10 * GIB)) as card:
        engines = {name: card.ours(name, model, ceiling_bytes=kv_bytes + GIB, **flags) for name in load.ours}
        engines |= {name: card.stock(name, model, **flags) for name in load.stock}
        wait_all([*engines.values()])
        share_cores([*engines.values()])
        ours, stock = engines[load.ours[0]], engines[load.stock[0]]
        for name, values in different_flags(ours, stock).items():
            say(f"flag {name}: ours {values[0]}, stock {values[1]}")
        with results.attempt("greedy answers equal to stock"):
            same_tokens(ours, stock, results)
        for engine in engines.values():
            fill_cache(engine, load.kv_tokens)
        take_turns(results, engines, load, rounds)


def run(args: argparse.Namespace) -> None:
    results = open_results("overhead")
    (model,) = ensure_models("llama8b")
    for name, load, rounds in (("low", LOW, args.requests), ("full", FULL, args.rounds)):
        if args.load in (None, name):
            with results.attempt(load.name):
                measure_load(results, model, load, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three rounds, fifteen requests")
    parser.add_argument("--rounds", type=int, default=12, help="of full load")
    parser.add_argument("--requests", type=int, default=150, help="rounds of low load")
    parser.add_argument("--load", choices=("full", "low"), help="only this one")
    parser.add_argument("--limit", type=float, default=560, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.requests = 3, 15
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
