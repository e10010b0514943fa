"""kvcached itself, measured in a process of its own: one JSON object a line, so that what came before a crash is kept.

    python -m benchmarks.gpu.kvcached_process [--only-mapping]

Started by ``grow.py`` with kvcached's hook active (``installed.kvcached_environment``). The pool is that of an 8B (32
layers, 128 KiB a token), made by kvcached's own calls for SGLang, and used through the allocator that it puts in the
place of SGLang's. Its settings are its defaults: 5 to 10 pages mapped ahead, device synchronised before a page is
unmapped.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import time
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.grow import GROW_GIB, GROW_TOKENS, TOKEN_BYTES, median_ms, steps_us, while_busy_us
from benchmarks.gpu.nvml import GIB, MIB

LAYERS, HEADS, HEAD_DIM = 32, 8, 128
POOL_TOKENS = 16 * GIB // TOKEN_BYTES
SETTLE_S = 0.5  # its thread refills what is mapped ahead


def report(what: str, value: float) -> None:
    print(json.dumps({"what": what, "value": value}), flush=True)


def used_bytes() -> int:
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def build() -> tuple[Any, float]:
    """(SGLang's allocator as kvcached replaces it, bytes that the idle pool takes from the card)"""
    import kvcached.integration.sglang.interfaces as interfaces  # type: ignore[import-not-found]
    import torch
    from sglang.srt.mem_cache import allocator as allocators

    torch.zeros(1, device="cuda")
    interfaces.init_kvcached(async_sched=True)
    before = used_bytes()
    tensors = interfaces.alloc_kv_cache(
        kvcache_shape=(POOL_TOKENS + 1, HEADS, HEAD_DIM),
        dtype=torch.bfloat16,
        device="cuda",
        num_layers=LAYERS,
    )
    manager = interfaces.get_kv_cache_manager(POOL_TOKENS + 1, 1, HEADS * HEAD_DIM * 2, LAYERS)
    pool = SimpleNamespace(kvcached_allocator=manager, tensors=tensors)
    allocator = allocators.TokenToKVPoolAllocator(POOL_TOKENS, torch.bfloat16, "cuda", pool, need_sort=False)
    assert "Elastic" in type(allocator).__name__, "kvcached's hook has not taken"
    allocator.available_size()
    time.sleep(SETTLE_S)
    return allocator, used_bytes() - before


def measure_mapping(allocator: Any, rounds: int) -> None:
    import torch

    slots: list[Any] = []

    def grow() -> None:
        slots.append(allocator.alloc(GROW_TOKENS))
        torch.cuda.synchronize()

    grow_ms, give_ms = median_ms(
        grow, lambda: allocator.free(slots.pop()), rounds, settle=lambda: time.sleep(SETTLE_S)
    )
    report("grow_ms", grow_ms / GROW_GIB)
    report("give_ms", give_ms / GROW_GIB)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only-mapping", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    faulthandler.enable()
    allocator, floor_bytes = build()
    report("floor_mib", floor_bytes / MIB)
    measure_mapping(allocator, args.rounds)
    if args.only_mapping:
        return
    for batch in (1, 32, 256):
        report(f"step_us_{batch}", statistics.median(steps_us(allocator, batch, 500) for _ in range(3)))
    slots: list[Any] = []
    report(
        "free_busy_us",
        while_busy_us(
            lambda: allocator.free(slots.pop()), lambda: slots.append(allocator.alloc(4096)), args.rounds
        ),
    )


if __name__ == "__main__":
    main()
