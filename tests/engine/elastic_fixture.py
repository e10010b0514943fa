"""SGLang's real allocator and radix tree over a real host arena, without an engine around them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.allocator.ledger import Ledger
from prism_sgl.allocator.page_pool import PagePool
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.engine.kv_layout import KvLayout
from prism_sgl.engine.slots import ElasticAllocator, build_allocator

PAGE = 2 << 20


@dataclass
class KvCache:
    """What the allocators ask of SGLang's KV pool."""

    elastic: ElasticPool
    layout: KvLayout


@dataclass
class Elastic:
    ledger: Ledger
    owner: Any
    pool: ElasticPool
    allocator: ElasticAllocator
    tree: RadixCache

    def grow(self, pages: int) -> None:
        ranges = self.pool.grow(pages)
        assert ranges is not None
        self.allocator.add_blocks(ranges)

    def cache(self, ids: list[int]) -> torch.Tensor:
        """Put ``ids`` into the tree as a finished request would; returns their slots."""
        slots = self.allocator.alloc(len(ids))
        assert slots is not None
        self.tree.insert(InsertParams(key=RadixKey(array("q", ids)), value=slots))
        return slots

    def cached(self, ids: list[int]) -> int:
        """How many leading tokens of ``ids`` are in the tree."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", ids))))
        return len(found.device_indices)


def make_elastic(
    folder: Path, *, token_bytes: int, num_tokens: int, block_tokens: int, budget_pages: int
) -> Elastic:
    path = str(folder / "ledger")
    Ledger.create(path, budget_pages * PAGE, "host0")
    ledger = Ledger.open(path)
    owner = ledger.join("unit", floor=1, ceiling=budget_pages, priority=0, bell=str(folder / "bell"))
    layout = KvLayout.plan(layers=4, row_bytes=token_bytes // 8, block_tokens=block_tokens, page_bytes=PAGE)
    pages = PagePool(
        page_bytes=layout.page.page_bytes,
        blocks_per_page=layout.page.blocks,
        num_blocks=num_tokens // block_tokens + 1,
    )
    pool = ElasticPool(HostArena("unit:kv", pages.num_pages, pages.page_bytes), owner, pages)
    assert pool.open() is not None
    allocator = build_allocator(
        num_tokens,
        page_size=block_tokens,
        dtype=torch.float16,
        device="cpu",
        kvcache=KvCache(pool, layout),
    )
    tree = RadixCache.create_simulated(mock_allocator=allocator, page_size=block_tokens)
    return Elastic(ledger, owner, pool, allocator, tree)
