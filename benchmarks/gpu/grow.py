"""What growing, giving back and allocating cost: our arena and slots against stock SGLang and kvcached.

    python -m benchmarks.gpu.grow [--quick]

No engine and no model; ours in this process, through ``CudaArena``, ``ElasticPool`` and ``ElasticTokenAllocator``;
kvcached in one of its own (kvcached_process.py), if it is importable, once in each of its layouts. A granule of its is
128 MiB for an 8B: by default one "compound" page, without contiguous layout 64 pages of 2 MiB. Targets of ten times
are against its default layout, except where a row says the other. Device time: about 2.6 minutes, most of them SGLang's
imports. Needs 20 GiB of card memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.installed import kvcached_environment
from benchmarks.gpu.nvml import GIB, MIB
from benchmarks.gpu.results import Results
from benchmarks.gpu.session import bounded, open_results, say

PAGE_SIZES_MIB = (2, 16, 32, 64, 128, 1024)
TOKEN_BYTES = 128 * 1024  # of an 8B
OUR_PAGE_MIB = 128  # the product's default on a card
GROW_GIB = 8  # far beyond the pages that kvcached keeps mapped ahead
GROW_TOKENS = GROW_GIB * GIB // TOKEN_BYTES
STEPS_AT_ONCE = 50
BLOCK_TOKENS = (16, 64)  # beside 1


def median_ms(
    action: Callable[[], None],
    after: Callable[[], None],
    rounds: int,
    settle: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """(median ms of ``action``, of ``after``), which undoes it. ``settle`` comes before each round."""
    forth, back = [], []
    for number in range(rounds + 2):
        settle()
        began = time.perf_counter()
        action()
        middle = time.perf_counter()
        after()
        end = time.perf_counter()
        if number >= 2:
            forth.append((middle - began) * 1e3)
            back.append((end - middle) * 1e3)
    return statistics.median(forth), statistics.median(back)


def stock_alloc(results: Results, rounds: int) -> tuple[float, float]:
    """cudaMalloc and cudaFree of 1 GiB, through torch."""
    import torch

    held: list[torch.Tensor] = []

    def grow() -> None:
        held.append(torch.empty(GIB, dtype=torch.uint8, device="cuda"))

    def give_back() -> None:
        held.clear()
        torch.cuda.empty_cache()

    times = median_ms(grow, give_back, rounds)
    results.add("stock: cudaMalloc of 1 GiB (torch.empty)", None, times[0], "ms/GiB")
    results.add("stock: cudaFree of 1 GiB (empty_cache)", None, times[1], "ms/GiB")
    return times


def kvcached_itself(folder: str, rounds: int, *, contiguous: bool) -> dict[str, float]:
    """What kvcached_process.py reports, as far as it came; empty if kvcached is not installed."""
    environment = kvcached_environment(Path(folder), "grow")
    if environment is None:
        return {}
    command = [sys.executable, "-m", "benchmarks.gpu.kvcached_process", f"--rounds={rounds}"]
    if not contiguous:
        environment["KVCACHED_CONTIGUOUS_LAYOUT"] = "false"
        command.append("--only-mapping")
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            said, complained = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            said, complained = process.communicate()
    if process.returncode:
        say(f"kvcached ended with {process.returncode}: {complained[-2000:]}")
    reported = (json.loads(line) for line in said.splitlines() if line.startswith('{"what"'))
    return {report["what"]: report["value"] for report in reported}


def arena_times(page_mib: int, rounds: int, *, zeroed: bool) -> tuple[float, float]:
    """(map, unmap) 1 GiB somewhere inside an arena of 16 GiB."""
    from prism_sgl.allocator.vmm_cuda import CudaArena

    page_bytes = page_mib * MIB
    per_gib = GIB // page_bytes
    arena = CudaArena("grow", 16 * per_gib, page_bytes, zeroed=zeroed)
    run = [range(3 * per_gib, 4 * per_gib)]
    try:
        return median_ms(lambda: arena.map(run), lambda: arena.unmap(run), rounds)
    finally:
        arena.close()


def measure_mapping(results: Results, rounds: int) -> None:
    from prism_sgl.allocator.cuda_calls import CudaCalls
    from prism_sgl.allocator.vmm_cuda import gives_zeroed_memory

    scrubbed = gives_zeroed_memory(CudaCalls(0), 2 * MIB)
    results.add("the driver scrubs memory before it is given out again", float(scrubbed), None, "")
    stock = (0.0, 0.0)
    with results.attempt("stock"):
        stock = stock_alloc(results, rounds)
    for page_mib in PAGE_SIZES_MIB:
        with results.attempt(f"pages of {page_mib} MiB"):
            few = max(3, rounds // 3) if page_mib == 2 else rounds
            mapped, unmapped = arena_times(page_mib, few, zeroed=not scrubbed)
            filled, _ = arena_times(page_mib, few, zeroed=True)
            ours = page_mib == OUR_PAGE_MIB
            for what, value, peer, target in (
                ("grow", mapped, stock[0], "< 1 ms/GiB"),
                ("give back", unmapped, stock[1], "< 1 ms/GiB"),
            ):
                results.add(
                    f"{what} 1 GiB, pages of {page_mib} MiB, against stock's cudaMalloc or cudaFree",
                    value,
                    peer or None,
                    "ms/GiB",
                    target=target if ours else "",
                    met=value < 1 if ours else None,
                    note=f"as the product does it; {filled:.3f} ms with filling by zeros"
                    if what == "grow"
                    else "",
                )


def build_elastic(folder: str, size_bytes: int, block_tokens: int = 1) -> tuple[Any, Any]:
    """(allocator with the first page's blocks, its pool)"""
    import torch

    from prism_sgl.allocator.elastic_pool import ElasticPool
    from prism_sgl.allocator.ledger import Ledger
    from prism_sgl.allocator.page_pool import PagePool
    from prism_sgl.allocator.vmm_cuda import CudaArena
    from prism_sgl.engine.kv_layout import KvLayout
    from prism_sgl.engine.slots import build_allocator

    ledger = Ledger.create(f"{folder}/ledger{block_tokens}", 2 * size_bytes, "gpu0")
    owner = ledger.join("grow", floor=0, ceiling=ledger.budget, priority=0, bell="")
    page_bytes = OUR_PAGE_MIB * MIB
    num_pages = size_bytes // page_bytes
    layout = KvLayout.plan(
        layers=32, row_bytes=TOKEN_BYTES // 64, block_tokens=block_tokens, page_bytes=page_bytes
    )
    arena = CudaArena("slots", num_pages, page_bytes, zeroed=False)
    pages = PagePool(
        page_bytes=page_bytes,
        blocks_per_page=layout.page.blocks,
        num_blocks=num_pages * layout.page.blocks,
    )
    pool = ElasticPool(arena, owner, pages)
    assert pool.open() is not None
    allocator = build_allocator(
        (pages.num_blocks - 1) * block_tokens,
        page_size=block_tokens,
        dtype=torch.bfloat16,
        device="cuda",
        kvcache=SimpleNamespace(elastic=pool, layout=layout),
    )
    return allocator, SimpleNamespace(pool=pool, arena=arena, page_bytes=page_bytes)


def steps_us(allocator: Any, batch: int, steps: int) -> float:
    """Host time of one decode step's allocator work: what is free, alloc of a slot a request, free of an old step's."""
    import torch

    held = [allocator.alloc(batch) for _ in range(64)]
    gc.collect()
    gc.disable()
    spent = 0.0
    for start in range(0, steps, STEPS_AT_ONCE):
        torch.cuda.synchronize()  # in an engine a forward pass lies between two steps: the queue never fills
        began = time.perf_counter()
        for number in range(start, start + STEPS_AT_ONCE):
            allocator.available_size()
            held.append(allocator.alloc(batch))
            allocator.free(held[number])
            held[number] = None
        spent += time.perf_counter() - began
    gc.enable()
    for slots in held:
        if slots is not None:
            allocator.free(slots)
    torch.cuda.synchronize()
    return spent / steps * 1e6


def token_steps(allocator: Any, steps: int) -> None:
    """Steps with blocks of one token: a slot a request of 32, and those of 64 steps ago come free."""
    held: deque[Any] = deque()
    for _ in range(steps):
        held.append(allocator.alloc(32))
        if len(held) > 64:
            allocator.free(held.popleft())
    while held:
        allocator.free(held.popleft())


def paged_steps(allocator: Any, steps: int) -> None:
    """Steps with larger blocks, with SGLang's calls in SGLang's order (mem_cache/allocation.py, radix_cache.py).

    32 requests decode. Every fourth step one of them ends, all that it has is freed as one segment of its row, and a
    request of 100 tokens takes its place.
    """
    import torch

    batch, prompt, device = 32, 100, allocator.device

    def rows_of(lengths: list[int]) -> Any:
        """[tokens of all] for new requests of these lengths"""
        nothing, cpu = torch.zeros(len(lengths), dtype=torch.int64), torch.tensor(lengths)
        new = allocator.alloc_extend(
            nothing.to(device, non_blocking=True),
            nothing,
            cpu.to(device, non_blocking=True),
            cpu,
            torch.full((len(lengths),), -1, device=device),
            sum(lengths),
        )
        assert new is not None, "the pool is too small"
        return new

    lengths = torch.full((batch,), prompt)  # known on the host, as in the engine
    rows = torch.zeros((batch, prompt + 4 * batch + 1), dtype=torch.int64, device=device)
    rows[:, :prompt] = rows_of([prompt] * batch).view(batch, prompt)
    for step in range(steps):
        allocator.available_size()
        on_card = lengths.to(device, non_blocking=True)
        last = rows.gather(1, on_card[:, None] - 1).view(-1)
        new = allocator.alloc_decode(on_card + 1, lengths + 1, last)
        assert new is not None, "the pool is too small"
        rows.scatter_(1, on_card[:, None], new[:, None])
        lengths += 1
        if step % 4 == 3:
            ended = step // 4 % batch
            allocator.free_group_begin()
            allocator.free_segment(rows[ended, : int(lengths[ended])], start_pos=0)
            allocator.free_group_end()
            lengths[ended] = prompt
            rows[ended, :prompt] = rows_of([prompt])
    for row, length in enumerate(lengths.tolist()):
        allocator.free_segment(rows[row, :length], start_pos=0)


def runs_without_sync(allocator: Any, steps: int = 4000) -> str:
    """ "" if so many steady-state steps never make the host wait for the card, else what did."""
    import torch

    take = token_steps if allocator.page_size == 1 else paged_steps
    take(allocator, 8)  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(allocator, steps)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def measure_sync(results: Results, ours: Any, stock: Any, block_tokens: int) -> None:
    """``stock``: SGLang's own allocator of as many tokens and blocks of the same size."""
    reason = runs_without_sync(ours)
    blocks = "" if block_tokens == 1 else f"blocks of {block_tokens} tokens: extend, decode, free a segment; "
    results.add(
        f"steps without any wait for the card ({blocks}4000, sync_debug_mode error)",
        float(not reason),
        float(not runs_without_sync(stock)),
        "",
        target="1",
        met=not reason,
        note=reason,
    )


def measure_paged_sync(results: Results, folder: str, block_tokens: int) -> None:
    import torch
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    ours, parts = build_elastic(folder, 2 * GIB, block_tokens)
    ours.add_blocks(parts.pool.grow_up_to(parts.arena.num_pages))
    tokens = 2 * GIB // TOKEN_BYTES
    stock = PagedTokenToKVPoolAllocator(tokens, block_tokens, torch.bfloat16, "cuda", None, need_sort=False)
    measure_sync(results, ours, stock, block_tokens)
    ours.check()
    ours.drop_all()
    parts.arena.close()


def busy_card(milliseconds: float) -> None:
    """A kernel that keeps the card busy for about so long."""
    import torch

    torch.cuda._sleep(int(milliseconds * 1e-3 * 1.7e9))


def while_busy_us(action: Callable[[], object], prepare: Callable[[], object], rounds: int) -> float:
    """Median us that the host spends in ``action`` while a kernel of 20 ms runs."""
    import torch

    times = []
    for _ in range(rounds):
        prepare()
        torch.cuda.synchronize()
        busy_card(20)
        began = time.perf_counter()
        action()
        times.append((time.perf_counter() - began) * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def measure_slots(results: Results, rounds: int, folder: str) -> None:
    # Before the imports here: two of them side by side would measure each other.
    peer = kvcached_itself(folder, max(3, rounds // 4), contiguous=True)
    scattered = kvcached_itself(folder, 3, contiguous=False)
    import torch

    say("importing SGLang's allocators")
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    ours, parts = build_elastic(folder, 8 * GIB + 2 * OUR_PAGE_MIB * MIB)
    for layout, reported in (("its default layout", peer), ("its other layout", scattered)):
        with results.attempt(f"kvcached, {layout}"):
            measure_against_kvcached(results, ours, parts, reported, layout)
    ours.add_blocks(parts.pool.grow_up_to(parts.arena.num_pages))
    stock = TokenToKVPoolAllocator(8 * GIB // TOKEN_BYTES - 1, torch.bfloat16, "cuda", None, need_sort=False)
    steps = 300 * rounds
    for batch in (1, 32, 256):
        with results.attempt(f"alloc and free, batch {batch}"):
            mine: list[float] = []
            theirs: list[float] = []
            for turn in range(7):
                pair = [(mine, ours), (theirs, stock)]
                for times, allocator in pair if turn % 2 else pair[::-1]:
                    times.append(steps_us(allocator, batch, steps))
            what, spent_us = f"alloc and free a step, batch {batch}", statistics.median(mine[1:])
            results.add(f"{what}, against stock", spent_us, statistics.median(theirs[1:]), "us")
            add_tenfold(results, f"{what}, against kvcached", spent_us, peer.get(f"step_us_{batch}"), "us")
    with results.attempt("no sync in the steady state"):
        measure_sync(results, ours, stock, 1)
    for block_tokens in BLOCK_TOKENS:
        with results.attempt(f"no sync in the steady state, blocks of {block_tokens} tokens"):
            measure_paged_sync(results, folder, block_tokens)
    with results.attempt("free while a kernel runs"):
        slots: list[Any] = []
        our_us = while_busy_us(
            lambda: ours.free(slots.pop()), lambda: slots.append(ours.alloc(4096).clone()), rounds
        )
        stock_us = while_busy_us(
            lambda: stock.free(slots.pop()), lambda: slots.append(stock.alloc(4096).clone()), rounds
        )
        what = "free() of 4096 slots while a kernel of 20 ms runs"
        results.add(f"{what}, against stock", our_us, stock_us, "us")
        add_tenfold(results, f"{what}, against kvcached", our_us, peer.get("free_busy_us"), "us")
    with results.attempt("unmapping while a kernel runs"):
        pool = parts.pool
        last = parts.arena.num_pages
        per_gib = GIB // parts.page_bytes
        ours.drop_pages(range(last - per_gib, last))
        arena, run = parts.arena, [range(last - per_gib, last)]
        unmapped = while_busy_us(lambda: arena.unmap(run), lambda: arena.map(run), rounds)
        arena.map(run)
        mapped = while_busy_us(lambda: arena.map(run), lambda: arena.unmap(run), rounds)
        arena.unmap(run)
        for what, spent_us in (("unmap", unmapped), ("map", mapped)):
            results.add(
                f"{what} 1 GiB while a kernel of 20 ms runs on other memory",
                spent_us / 1e3,
                None,
                "ms",
                note=f"median of {rounds}",
            )
        assert pool.mapped_bytes == arena.mapped_bytes
    with results.attempt("idle floor"):
        ours.drop_pages(ours.empty_pages())
        add_tenfold(
            results,
            "KV that an idle engine cannot give back, against kvcached",
            parts.pool.mapped_bytes / MIB,
            peer.get("floor_mib"),
            "MiB",
            note="; peer: what its pool takes from the card before any use (zero page, null page, pages mapped ahead); "
            "up to 5 pages of 128 MiB more after use, and the prefix cache up to 16,000 tokens",
        )


def add_tenfold(
    results: Results, what: str, ours: float, peer: float | None, unit: str, note: str = ""
) -> None:
    """A row whose target is a tenth of the peer's."""
    results.add(
        what,
        ours,
        peer,
        unit,
        target=">= 10x",
        met=None if peer is None else peer >= 10 * ours,
        note=("kvcached was not run" if peer is None else f"{peer / ours:.1f} times") + note,
    )


def measure_against_kvcached(
    results: Results, ours: Any, parts: Any, peer: dict[str, float], layout: str
) -> None:
    """8 GiB grown and allocated, then freed and given back, each through the allocator that SGLang calls."""
    import torch

    slots: list[Any] = []

    def grow() -> None:
        ours.add_blocks(parts.pool.grow_up_to(math.ceil(GROW_TOKENS / ours.page_tokens)))
        slots.append(ours.alloc(GROW_TOKENS))
        torch.cuda.synchronize()

    def give_back() -> None:
        ours.free(slots.pop())
        ours.drop_pages(ours.empty_pages())

    grow_ms, give_ms = median_ms(grow, give_back, 5, settle=torch.cuda.synchronize)
    for what, mine, theirs in (
        ("grow and allocate", grow_ms, "grow_ms"),
        ("free and give back", give_ms, "give_ms"),
    ):
        add_tenfold(
            results, f"{what} 8 GiB, against kvcached, {layout}", mine / GROW_GIB, peer.get(theirs), "ms/GiB"
        )


def run(args: argparse.Namespace) -> None:
    results = open_results("grow")
    rounds = 6 if args.quick else 20
    import torch

    torch.zeros(1, device="cuda")
    with results.attempt("mapping"):
        measure_mapping(results, rounds)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, results.attempt("slots"):
        Path(folder).chmod(0o700)
        measure_slots(results, rounds, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a third of the rounds")
    parser.add_argument("--limit", type=float, default=200, help="seconds, then what is measured is kept")
    args = parser.parse_args()
    with bounded(args.limit):
        run(args)


if __name__ == "__main__":
    main()
