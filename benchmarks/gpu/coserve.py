"""Three 8B models on one card with peaks in turn: plain SGLang's static split, kvcached, ours.

    python -m benchmarks.gpu.coserve [--quick] [--systems stock,ours,kvcached] [--peak 16] [--model llama8b]

kvcached's published case: models that are busy one after the other. Every model has a base of 0.5 requests a second and
its own peak of eight seconds; prompts of 512 to 1,536 tokens, answers of 256, arrivals from one seed, the same for
every system. The systems run one after the other, each with three engines in the same number of bytes: the static split
gives each engine a third of the KV, ours has one ledger of that size, kvcached sees a card of that size (a process
holds the rest). TTFT counts from when a request should have been sent. In process, no HTTP. "Ahead" is judged at the
worse end of a 95 % interval over the requests, in pairs, for each system is sent the same ones at the same times. After
serving, each engine is asked the same questions one by one, whose greedy tokens are to be stock's.

Device time: about 4.5 minutes for stock and ours with the model in /dev/shm (ours imports while stock starts); one
system alone 2.2 minutes, so ``--systems stock`` and ``--systems ours`` may be two calls: give the second the first's
``coserve-raw.json`` with ``--with FILE``, and it compares both. Needs 72 GiB of card memory; kvcached must be
importable, else its row says that it was not run.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.gpu.card import Card
from benchmarks.gpu.children import Engine
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.installed import find_kvcached
from benchmarks.gpu.models import KV_BYTES_PER_TOKEN, ensure_models
from benchmarks.gpu.nvml import GIB, card_info, card_used_mib
from benchmarks.gpu.results import Results, result_path
from benchmarks.gpu.session import bounded, open_results, say
from benchmarks.gpu.stats import Ratio, Statistic, mean, quantile, ratio_of_requests

NUM_MODELS = 3
PERIOD_S, PEAK_S, BASE_RATE = 12.0, 8.0, 0.5
NEW_TOKENS = 256
MAX_RUNNING = 160
# Bytes of a model's weights, and of an engine beside weights and KV (context, graphs, a pass).
WEIGHTS_GIB = {"llama8b": 15.1, "llama1b": 2.4}
BESIDE_GIB = 2.0
QUESTIONS = [
    Ask(seed=1 + n, tokens=tokens, new_tokens=16) for n, tokens in enumerate((3, 20, 60, 200, 700, 1500))
]


@dataclass
class Served:
    """What one system did. Seconds."""

    ttfts_s: list[float]
    tpots_s: list[float]
    failures: list[str]
    requests: int
    wall_s: float
    used_mib: float
    answers: list[list[list[int]]] = field(default_factory=list)  # to QUESTIONS, of each engine

    @property
    def arrivals(self) -> int | None:
        """How many requests there were, if all were answered: then sample n is request n."""
        return None if self.failures or len(self.ttfts_s) != self.requests else self.requests


@dataclass(frozen=True)
class Metric:
    what: str
    of: Callable[[Served], list[float]]
    statistic: Statistic
    is_judged: bool = False

    def value_ms(self, served: Served) -> float:
        return float(self.statistic(np.asarray(self.of(served)))) * 1e3

    def ratio(self, ours: Served, peer: Served) -> Ratio:
        mine, theirs = self.of(ours), self.of(peer)
        same_requests = ours.arrivals is not None and ours.arrivals == peer.arrivals
        paired = same_requests and len(mine) == len(theirs) == ours.arrivals
        return ratio_of_requests(mine, theirs, self.statistic, paired=paired)


METRICS = [
    Metric("TTFT mean", lambda s: s.ttfts_s, mean, is_judged=True),
    Metric("TTFT p50", lambda s: s.ttfts_s, quantile(0.5)),
    Metric("TTFT p99", lambda s: s.ttfts_s, quantile(0.99), is_judged=True),
    Metric("TPOT mean", lambda s: s.tpots_s, mean),
]


def arrivals(model: int, peak_rate: float, seconds: float, seed: int) -> list[Ask]:
    """A Poisson process whose rate is ``peak_rate`` in the model's own peaks, else the base rate."""
    dice = random.Random(seed * 100 + model)
    asks: list[Ask] = []
    now = 0.0
    while True:
        now += dice.expovariate(peak_rate)
        if now >= seconds:
            return asks
        phase = (now - model * PERIOD_S) % (NUM_MODELS * PERIOD_S)
        rate = peak_rate if phase < PEAK_S else BASE_RATE
        if dice.random() < rate / peak_rate:  # thinning
            tokens = dice.randrange(512, 1536)
            asks.append(Ask(seed * 10**7 + model * 10**6 + len(asks), tokens, NEW_TOKENS, at_s=now))


def serve(engines: Sequence[Engine], args: argparse.Namespace) -> Served:
    for number, engine in enumerate(engines):  # kernels and graphs of every size that matters
        engine.send_burst([Ask(7000 * (number + 1) + n, 600, 32) for n in range(24)])
    for engine in engines:
        engine.receive_burst()
    at = time.monotonic() + 1.0
    for number, engine in enumerate(engines):
        asks = arrivals(number, args.peak, args.seconds, args.seed)
        say(f"{engine.name}: {len(asks)} requests in {args.seconds:.0f} s")
        engine.send_burst(asks, at=at)
    bursts = [engine.receive_burst(args.seconds + 120) for engine in engines]
    answers = [answer for burst in bursts for answer in burst.answers]
    good = [answer for answer in answers if answer["ttft_s"] is not None]
    return Served(
        ttfts_s=[answer["sent_s"] + answer["ttft_s"] for answer in good],
        tpots_s=[answer["tpot_s"] for answer in good if answer["tpot_s"] is not None],
        failures=[error for burst in bursts for error in burst.errors],
        requests=len(answers),
        wall_s=max(burst.wall_s for burst in bursts),
        used_mib=card_used_mib(),
    )


def start(card: Card, system: str, args: argparse.Namespace) -> list[Engine]:
    (model,) = ensure_models(args.model)
    token_bytes = KV_BYTES_PER_TOKEN[args.model]
    kv_tokens = int(kv_gib(args) * GIB / token_bytes)
    flags = {
        "context_length": 4096,
        "max_running_requests": MAX_RUNNING,
        "cuda_graph_max_bs_decode": MAX_RUNNING,
        "log_level": "info" if system == "ours" else "warning",
    }
    engines = []
    for number in range(NUM_MODELS):
        name = f"{system}{number}"
        if system == "stock":
            engines.append(card.stock(name, model, max_total_tokens=kv_tokens // NUM_MODELS, **flags))
        elif system == "kvcached":
            engines.append(card.kvcached(name, model, max_total_tokens=kv_tokens, **flags))
        else:
            engines.append(card.ours(name, model, **flags))
    return engines


def kv_gib(args: argparse.Namespace) -> float:
    rest: float = args.budget_gib - NUM_MODELS * (WEIGHTS_GIB[args.model] + BESIDE_GIB)
    return rest


def report(results: Results, served: dict[str, Served], args: argparse.Namespace) -> None:
    ours = served.get("ours")
    for peer_name in ("stock", "kvcached"):
        peer = served.get(peer_name)
        if peer is None:
            continue
        for metric in METRICS:
            ratio = metric.ratio(ours, peer) if ours else None
            results.add(
                f"{NUM_MODELS} x {args.model}, peaks of {args.peak:g}/s: {metric.what}, against {peer_name}",
                metric.value_ms(ours) if ours else None,
                metric.value_ms(peer),
                "ms",
                ratio=ratio,
                target="ahead, at the worse end of the interval" if metric.is_judged else "",
                met=ratio.high < 1 if ratio is not None and metric.is_judged else None,
            )
    report_answers(results, served)
    for name, system in served.items():
        results.add(
            f"failed requests, {name}",
            float(len(system.failures)) if name == "ours" else None,
            None if name == "ours" else float(len(system.failures)),
            f"of {system.requests}",
            target="0" if name == "ours" else "",
            met=not system.failures if name == "ours" else None,
            note=f"card used {system.used_mib / 1024:.1f} GiB of {args.budget_gib:g}, "
            f"KV about {kv_gib(args):.1f} GiB in all, done after {system.wall_s:.1f} s"
            + (f"; {system.failures[0]}" if system.failures else ""),
        )
    # Raw times, so that systems of two calls can be compared.
    raw = {name: asdict(system) for name, system in served.items()}
    result_path("coserve").with_name("coserve-raw.json").write_text(json.dumps(raw))


def ask_greedy(results: Results, name: str, system: Served, engines: Sequence[Engine]) -> None:
    with results.attempt(f"greedy answers after serving, {name}"):
        system.answers = [engine.greedy(QUESTIONS) for engine in engines]


def report_answers(results: Results, served: dict[str, Served]) -> None:
    """Every engine serves the same weights, so the first of stock's says what is right."""
    stock = served.get("stock")
    if stock is None or not stock.answers:
        return
    right = stock.answers[0]
    for name, system in served.items():
        pairs = [pair for answers in system.answers for pair in zip(answers, right, strict=True)]
        if not pairs:
            continue
        same = float(sum(one == other for one, other in pairs))
        results.add(
            f"greedy answers equal to stock's after serving, {name}",
            same if name == "ours" else None,
            float(len(pairs)) if name == "ours" else same,
            "answers" if name == "ours" else f"of {len(pairs)}",
            target="all" if name == "ours" else "",
            met=same == len(pairs) if name == "ours" else None,
            note=f"{len(right)} questions, one by one, of each of {len(system.answers)} engines",
        )


def run(args: argparse.Namespace) -> None:
    results = open_results("coserve")
    served: dict[str, Served] = {}
    for file in args.with_files:
        served |= {name: Served(**raw) for name, raw in json.loads(Path(file).read_text()).items()}
    ensure_models(args.model)
    systems = args.systems.split(",")
    with Card(int(args.budget_gib * GIB)) as ours_card:
        ours_card.only_prepare = True
        waiting = start(ours_card, "ours", args) if "ours" in systems else []
        for system in ("stock", "kvcached"):
            if system not in systems:
                continue
            if system == "kvcached" and find_kvcached() is None:
                results.add("kvcached", None, None, "", note="not run: kvcached is not installed")
                continue
            with results.attempt(system), Card(GIB) as card:
                if system == "kvcached":
                    rest = card_info().total_bytes - int(args.budget_gib * GIB)
                    card.child("ballast").call("hold", size_bytes=max(rest - GIB, 1))
                engines = start(card, system, args)
                for engine in engines:
                    engine.wait()
                served[system] = serve(engines, args)
                ask_greedy(results, system, served[system], engines)
                report(results, served, args)
        if waiting:
            with results.attempt("ours"):
                for engine in waiting:
                    engine.begin()
                for engine in waiting:
                    engine.wait()
                served["ours"] = serve(waiting, args)
                ask_greedy(results, "ours", served["ours"], waiting)
                report(results, served, args)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one peak a model of half the length")
    parser.add_argument("--systems", default="stock,ours,kvcached")
    parser.add_argument("--model", default="llama8b", choices=sorted(WEIGHTS_GIB))
    parser.add_argument("--budget-gib", type=float, default=70.0, help="of the card, for all three engines")
    parser.add_argument("--peak", type=float, default=16.0, help="requests a second of a model in its peak")
    parser.add_argument("--seconds", type=float, default=NUM_MODELS * PERIOD_S)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--with", dest="with_files", action="append", default=[], metavar="FILE")
    parser.add_argument("--limit", type=float, default=400, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    if args.quick:
        args.seconds = args.seconds / 2
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
