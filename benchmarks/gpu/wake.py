"""Sleep and wake of an 8B and a 1B against the link's speed and SGLang's own release/resume_memory_occupation.

    python -m benchmarks.gpu.wake [--quick] [--cycles 5] [--no-peers]

Six engines start at once on one card: ours 8B and 1B in one ledger, and of each size plain SGLang with
torch_memory_saver and CPU backup, by default and with TMS_RETAIN_CPU_BACKUP=1; on a card of 80 GiB the 8B's peers only.
Each is measured while the others are idle. Device time: about 3.3 minutes with the models in /dev/shm (110 s of them
start-up), 2 without peers. Needs 83 GiB of card memory (75 without the 1B's peers), 85 GiB of host memory, and of the
product: ``prism_sleep(keep_weights)``, ``prism_wake(timeout_s, wait)`` and the log lines of both and of loading.

Times are of the engine's own call in its own process: an rpc to the scheduler, less an rpc that does nothing. "First
token" counts from the begin of the wake to the first streamed token of a request sent right after it. "First sleep"
is all that it costs beyond loading, wherever it is done: the image's host memory is made and page-locked in a thread
while the model loads, the image is filled before the engine is ready. The waits of the one for the other count twice.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.card import Card, Neighbour
from benchmarks.gpu.children import (
    EMPTY_RPC,
    SLEEP,
    SLEEP_KEEPING_WEIGHTS,
    WAKE,
    WAKE_AND_WAIT,
    Action,
    Child,
    Engine,
)
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.models import ensure_models
from benchmarks.gpu.nvml import GIB, card_info
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results, say

FLAGS = {
    "max_total_tokens": 4096,
    "context_length": 2048,
    "max_running_requests": 16,
    "cuda_graph_max_bs_decode": 8,
}
QUESTIONS = [Ask(seed=1, tokens=6, new_tokens=16), Ask(2, 50, 16), Ask(3, 400, 16)]
RELEASE: Action = {"name": "release_memory_occupation"}
RESUME: Action = {"name": "resume_memory_occupation"}
PEERS_OF_BOTH_BYTES = 90 * GIB  # a card that has the room for the 1B's peers too
# What the scheduler's log says, prism_sgl/engine/image_client.py, weights_loading.py and arrival.py.
IMAGE_MEMORY = r"image memory: (\d+) MiB made in ([\d.]+) s, page-locked in ([\d.]+) s"
LOADED = r"storages, ([\d.]+) MiB.* image in ([\d.]+) s, page-locked in ([\d.]+) s"
COPIED = r"wake: all weights are there after ([\d.]+) s"
MAPPED = r"wake: (\d+) MiB of weights mapped in ([\d.]+) s"


@dataclass
class Times:
    """Seconds."""

    sleeps: list[float] = field(default_factory=list)
    wakes: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)
    first_sleep_s: float | None = None  # all that the first sleep costs beyond loading, wherever it is done
    same_tokens: bool = True

    def median(self, name: str) -> float:
        values: list[float] = getattr(self, name)
        return statistics.median(values)


def link_rate(probe: Child, results: Results, when: str) -> float:
    rates: list[float] = probe.receive(120)
    median = statistics.median(rates)
    results.add(f"link: host to card, page-locked, 1 GiB at once, {when}", median / 1e9, None, "GB/s")
    return median


def measure_cycles(engine: Engine, sleep: Action, wake: Action, cycles: int, empty_s: float) -> Times:
    times = Times()
    before = engine.greedy(QUESTIONS)
    for cycle in range(cycles):
        times.sleeps.append(engine.act(sleep)[0] - empty_s)
        woken = engine.act_then_generate(wake, Ask(100 + cycle, 16, 1))
        if woken["answer"]["error"]:
            raise RuntimeError(f"first request after wake: {woken['answer']['error']}")
        times.wakes.append(woken["action_s"] - empty_s)
        times.first_tokens.append(woken["first_token_s"])
        after = engine.greedy(QUESTIONS)
        times.same_tokens &= after == before
        say(
            f"{engine.name}: sleep {times.sleeps[-1]:.4f} s, wake {times.wakes[-1]:.4f} s, "
            f"first token {times.first_tokens[-1]:.4f} s, same tokens {after == before}"
        )
    return times


@dataclass
class Copy:
    """One wake that waits for its copies. Seconds."""

    map_s: float
    copy_s: float
    wake_s: float


def measure_copies(engine: Engine, cycles: int, empty_s: float) -> list[Copy]:
    copies = []
    for _ in range(cycles):
        engine.act(SLEEP)
        mark = engine.log_mark()
        wake_s = engine.act(WAKE_AND_WAIT)[0] - empty_s
        copied, mapped = engine.log_matches(COPIED, mark), engine.log_matches(MAPPED, mark)
        if copied and mapped:
            copies.append(Copy(float(mapped[-1][1]), float(copied[-1][0]), wake_s))
    return copies


def first_sleep(engine: Engine, label: str, results: Results, sleep_s: float) -> float:
    """All that the first sleep costs beyond loading, in seconds. ``sleep_s``: of the sleep itself."""
    loaded, made = engine.log_matches(LOADED), engine.log_matches(IMAGE_MEMORY)
    if not loaded or not made:
        raise RuntimeError("the scheduler's log does not say what image and page-locking took")
    image_s, late_lock_s = map(float, loaded[-1][1:])
    make_s, lock_s = (sum(float(line[column]) for line in made) for column in (1, 2))
    big = label == "8B"
    thread = "in a thread while the model loads"
    results.add(f"{label}: first sleep: host memory of the image made, {thread}", make_s, None, "s")
    results.add(f"{label}: first sleep: that memory page-locked, {thread}", lock_s, None, "s")
    waited_for_s = image_s + late_lock_s + sleep_s
    results.add(
        f"{label}: first sleep: image filled and sealed before the engine is ready, then the sleep itself",
        waited_for_s,
        None,
        "s",
        note=f"image {image_s} s, page-locking after it {late_lock_s} s, the sleep {sleep_s:.4f} s",
    )
    total_s = make_s + lock_s + waited_for_s
    results.add(
        f"{label}: first sleep beyond loading, populating and page-locking included",
        total_s,
        None,
        "s",
        target="< 2 s" if big else "",
        met=total_s < 2 if big else None,
    )
    return total_s


def measure_ours(engine: Engine, label: str, results: Results, link: float, cycles: int) -> Times:
    big = label == "8B"
    empty_s = statistics.median(engine.act(EMPTY_RPC, 30))
    awake_s = statistics.median(engine.burst([Ask(50 + n, 16, 1)]).ttfts_s[0] for n in range(5))
    times = measure_cycles(engine, SLEEP, WAKE, cycles, empty_s)
    with results.attempt(f"{label}: first sleep"):
        times.first_sleep_s = first_sleep(engine, label, results, times.sleeps[0])
    sleep_s, wake_s, first_s = (times.median(name) for name in ("sleeps", "wakes", "first_tokens"))
    results.add(
        f"{label}: sleep",
        sleep_s,
        None,
        "s",
        target="< 0.05 s" if big else "",
        met=sleep_s < 0.05 if big else None,
    )
    results.add(f"{label}: wake, until it returns (its copies go on)", wake_s, None, "s")
    results.add(
        f"{label}: first token, from the begin of the wake",
        first_s,
        None,
        "s",
        target="< 0.40 s" if big else "",
        met=first_s < 0.40 if big else None,
        note=f"an empty rpc takes {empty_s * 1e3:.2f} ms",
    )
    results.add(f"{label}: first token of the same request, awake", awake_s, None, "s")
    results.add(
        f"{label}: same tokens after each of {cycles} wakes",
        float(times.same_tokens),
        None,
        "",
        target="1",
        met=times.same_tokens,
    )
    loaded, copies = engine.log_matches(LOADED), measure_copies(engine, cycles, empty_s)
    if not loaded or not copies:
        raise RuntimeError("the scheduler's log says nothing about the copy")
    weights_bytes = float(loaded[-1][0]) * 2**20
    copy_s = statistics.median(copy.copy_s for copy in copies)
    complete_s = statistics.median(copy.wake_s for copy in copies)
    rate = weights_bytes / copy_s
    results.add(
        f"{label}: copy of the weights against the link",
        rate / 1e9,
        link / 1e9,
        "GB/s",
        target=">= 95 % of link" if big else "",
        met=rate >= 0.95 * link if big else None,
        note=f"{weights_bytes / GIB:.2f} GiB in {copy_s:.3f} s, mapped before in "
        f"{statistics.median(copy.map_s for copy in copies):.4f} s, the whole wake {complete_s:.3f} s",
    )
    results.add(
        f"{label}: first token later than the copy of the weights takes",
        (first_s - copy_s) * 1e3,
        None,
        "ms",
        target="< 20 ms" if big else "",
        met=first_s - copy_s < 0.020 if big else None,
        note=f"medians: first token {first_s:.4f} s from the begin of the wake, with the rpc and the mapping; "
        f"copy {copy_s:.3f} s. A wake that waits for its copy takes {complete_s:.4f} s",
    )
    return times


def measure_partial(card: Card, engine: Engine, results: Results, cycles: int) -> None:
    """A model that was asleep with its weights in place, and lost 30 % of them to a neighbour."""

    def held() -> int:
        return card.owner(engine).weights

    before_ids = engine.greedy(QUESTIONS)
    empty_s = statistics.median(engine.act(EMPTY_RPC, 10))
    whole = held()
    first_tokens, wakes, takes, lost = [], [], [], []
    same = True
    neighbour = Neighbour(card)
    try:
        for cycle in range(cycles):
            engine.act(SLEEP_KEEPING_WEIGHTS)
            wanted = neighbour.free_bytes() + int(whole * 0.30) * 2 * 2**20
            took = neighbour.take(wanted)
            if took is None:
                raise RuntimeError("the sleeping model gave nothing back within 5 s")
            takes.append(took)
            lost.append(1 - held() / whole)
            neighbour.give_back()
            woken = engine.act_then_generate(WAKE, Ask(200 + cycle, 16, 1))
            wakes.append(woken["action_s"] - empty_s)
            first_tokens.append(woken["first_token_s"])
            same &= engine.greedy(QUESTIONS) == before_ids
    finally:
        neighbour.close()
    first = statistics.median(first_tokens)
    results.add(
        "8B that lost 30 % of its pages: first token, from the begin of the wake",
        first,
        None,
        "s",
        target="< 0.15 s",
        met=first < 0.15 and same,
        note=f"lost {statistics.mean(lost):.0%}, given in {statistics.median(takes) * 1e3:.1f} ms, "
        f"wake rpc {statistics.median(wakes):.3f} s, same tokens: {same}",
    )


def compare(
    results: Results, label: str, peer_name: str, ours: Times | None, peer: Times, *, skip_first: bool
) -> None:
    rest = slice(1, None) if skip_first and len(peer.sleeps) > 1 else slice(None)
    note = "" if peer.same_tokens else "the peer's tokens changed after a wake"
    results.add(
        f"{label}: first sleep beyond loading, against {peer_name}",
        ours.first_sleep_s if ours else None,
        peer.sleeps[0],
        "s",
        note=note,
    )
    for what, name in (
        ("sleep", "sleeps"),
        ("wake, until it returns", "wakes"),
        ("first token from the begin of the wake", "first_tokens"),
    ):
        results.add(
            f"{label}: {what}, against {peer_name}",
            ours.median(name) if ours else None,
            statistics.median(getattr(peer, name)[rest]),
            "s",
            note=note,
        )


def start_peers(card: Card, models: dict[str, Path]) -> list[tuple[str, str, Engine, int]]:
    """(size, name, engine, cycles to measure) of each, as far as the card has the room."""
    peers = []
    for label, model in models.items():
        if label == "1B" and card_info().total_bytes < PEERS_OF_BOTH_BYTES:
            say(f"the 1B has no peers here: they need a card of {PEERS_OF_BOTH_BYTES // GIB} GiB")
            continue
        for retain, what, cycles in ((False, "default", 2), (True, "TMS_RETAIN_CPU_BACKUP=1", 3)):
            name = f"tms{label}-retain" if retain else f"tms{label}"
            engine = card.memory_saver(name, model, retain=retain, **FLAGS)
            peers.append((label, f"torch_memory_saver, {what}", engine, cycles))
    return peers


def run(args: argparse.Namespace) -> None:
    results = open_results("wake")
    model8, model1 = ensure_models("llama8b", "llama1b")
    with Card(40 * GIB) as card:
        probe = card.child("link")
        probe.send("link")  # while the others import, long before they load
        ours8 = card.ours("ours8b", model8, **FLAGS)
        ours1 = card.ours("ours1b", model1, **FLAGS)
        peers = [] if args.no_peers else start_peers(card, {"8B": model8, "1B": model1})
        link = 0.0
        with results.attempt("link speed at the begin"):
            link = link_rate(probe, results, "engines still importing")
        for engine in card.engines:
            with results.attempt(f"start of {engine.name}"):
                engine.wait()
        with results.attempt("link speed"):
            probe.send("link")
            link = max(link, link_rate(probe, results, "all engines idle"))
            probe.close()
        ours: dict[str, Times] = {}
        for engine, label in ((ours8, "8B"), (ours1, "1B")):
            with results.attempt(f"{label}: sleep and wake"):
                if engine.is_ready:
                    ours[label] = measure_ours(engine, label, results, link or 5e10, args.cycles)
        with results.attempt("8B that lost 30 % of its pages"):
            if ours8.is_ready:
                measure_partial(card, ours8, results, min(args.cycles, 3))
        for label, name, engine, cycles in peers:
            with results.attempt(f"{label}, {name}"):
                if engine.is_ready:
                    empty_s = statistics.median(engine.act(EMPTY_RPC, 10))
                    times = measure_cycles(engine, RELEASE, RESUME, cycles, empty_s)
                    compare(results, label, name, ours.get(label), times, skip_first="RETAIN" in name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two cycles, no peers")
    parser.add_argument("--cycles", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--limit", type=float, default=330, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    if args.quick:
        args.cycles, args.no_peers = 2, True
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
