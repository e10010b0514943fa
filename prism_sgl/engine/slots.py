"""SGLang's token allocators over an elastic pool: the free list holds only blocks on mapped pages.

A block is ``block_tokens`` tokens (SGLang's ``page_size``), a page is the unit of mapping. The free list holds SGLang's
numbers of blocks, which have gaps; the books count blocks densely (kv_layout.py). Blocks are taken
lowest first, so that the highest pages come free and can be given back; SGLang's stock list is a FIFO that
walks through the whole range (srt/mem_cache/allocator/token.py). Freed blocks wait in ``release_pages`` and are
sorted back only when the sorted part runs short or has fallen behind, and not at all while nearly every block is in
use: a sort is not worth a decode step.

The list lives on the device. Its length is known on the host without a sync; which page a block is on is
learned only in a reclaim, which may sync.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.utils import get_num_new_pages

from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.engine.kv_layout import KvLayout

# Sort the freed blocks back once they are more than this part of the list.
_MERGE_WHEN_RELEASED = 1 / 8
# With less of the usable blocks free than this, their order decides nothing about which pages come free. An engine
# whose prefix cache is full is there all the time: each prefill and every third decode step of a large batch evicts.
_SORT_WHEN_FREE = 1 / 8


class ElasticBlocks:
    """What both allocators share: a free list that grows and shrinks with the mapped pages.

    Invariant: free + released + used == usable blocks without block 0 (SGLang's padding sink).
    """

    size: int
    page_size: int
    device: str
    free_pages: torch.Tensor
    release_pages: torch.Tensor
    _kvcache: Any

    @property
    def elastic(self) -> ElasticPool:
        pool: ElasticPool = self._kvcache.elastic
        return pool

    @property
    def layout(self) -> KvLayout:
        layout: KvLayout = self._kvcache.layout
        return layout

    def clear(self) -> None:
        """Every usable block is free again (SGLang calls this at start and in ``flush_cache``)."""
        self.free_pages = torch.empty((0,), dtype=torch.int64, device=self.device)
        self.release_pages = torch.empty((0,), dtype=torch.int64, device=self.device)
        self.add_blocks(self.elastic.usable_ranges())
        self.merge_and_sort_free()
        self.is_not_in_free_group = True
        self.free_group: list[torch.Tensor] = []
        self.free_page_reps_group: list[torch.Tensor] = []

    @property
    def usable_blocks(self) -> int:
        """Blocks on mapped pages, used or free, without the padding block."""
        pages = self.elastic.pages
        return pages.usable_blocks - pages.is_usable(0)

    def used_blocks(self) -> int:
        return self.usable_blocks - len(self.free_pages) - len(self.release_pages)

    def virtual_available_size(self) -> int:
        """Tokens that would be free if the whole range were mapped: what SGLang's leak check counts with."""
        num_blocks = self.size // self.page_size
        return (num_blocks - self.used_blocks()) * self.page_size

    def usable_tokens(self) -> int:
        """Tokens on mapped pages, used or free."""
        return self.usable_blocks * self.page_size

    @property
    def page_tokens(self) -> int:
        """Tokens of a page of the arena."""
        return self.elastic.pages.blocks_per_page * self.page_size

    def unmapped_tokens(self) -> int:
        """Tokens that could be had by mapping the rest of the range."""
        return max(0, self.size // self.page_size - self.usable_blocks) * self.page_size

    # -- growing and shrinking, at safe points only

    def add_blocks(self, ranges: Sequence[range]) -> None:
        """Pages were mapped: these blocks are usable now, and sorted in when they are needed, like freed ones."""
        if not ranges:
            return
        # Made on the device: a copy to it would queue behind the weights of a model that wakes.
        fresh = [
            self.layout.ids(torch.arange(max(r.start, 1), r.stop, dtype=torch.int64, device=self.device))
            for r in ranges
        ]
        self.release_pages = torch.cat((self.release_pages, *fresh))

    def merge_and_sort_free(self) -> None:
        """Released blocks can be taken again. In the place of SGLang's (allocator/base.py:72), which always sorts."""
        if len(self.release_pages):
            self.free_pages = torch.cat((self.free_pages, self.release_pages))
            self.release_pages = torch.empty((0,), dtype=torch.int64, device=self.device)
            if self._order_counts:
                self.free_pages, _ = torch.sort(self.free_pages)

    def tidy(self) -> None:
        """Sort released blocks back when they have become many, so that low pages are filled first."""
        if len(self.release_pages) > _MERGE_WHEN_RELEASED * len(self.free_pages) and self._order_counts:
            self.merge_and_sort_free()

    @property
    def _order_counts(self) -> bool:
        return len(self.free_pages) + len(self.release_pages) > _SORT_WHEN_FREE * self.usable_blocks

    def free_per_page(self) -> torch.Tensor:
        """``[num_pages]`` int32, on the device, which is not waited for: the lists hold as many numbers as there are
        tokens, the answer one a page.
        """
        free = self.layout.pages(torch.cat((self.free_pages, self.release_pages)))
        # Not bincount, which waits for the device to learn the largest number.
        counts = torch.zeros(self.elastic.pages.num_pages, dtype=torch.int32, device=self.device)
        return counts.scatter_add_(0, free, torch.ones_like(free, dtype=torch.int32))

    def used_per_page(self, free_per_page: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int64]:
        """``[num_pages]``: usable blocks of each page that are not free; block 0 counts as used.

        ``free_per_page``: as it is on the host by now; else the device is waited for.
        """
        if free_per_page is None:
            free_per_page = self.free_per_page().cpu().numpy()
        pages = self.elastic.pages
        usable = np.zeros(pages.num_pages, dtype=np.int64)
        usable[list(pages.mapped_pages)] = pages.blocks_per_page
        if pages.is_mapped(pages.num_pages - 1):
            usable[-1] = len(pages.blocks_of(range(pages.num_pages - 1, pages.num_pages)))
        used: npt.NDArray[np.int64] = usable - free_per_page
        return used

    def empty_pages(self, used: npt.NDArray[np.int64] | None = None) -> list[int]:
        """Mapped pages that hold no used block, so never block 0's; highest first: so they are given back.

        ``used``: what ``used_per_page`` has just said.
        """
        used = self.used_per_page() if used is None else used
        return [p for p in sorted(self.elastic.pages.mapped_pages, reverse=True) if used[p] == 0]

    def drop_pages(self, pages: Iterable[int], let_go: Callable[[], object] | None = None) -> int:
        """Give these pages back to the device; returns how many. Nothing is on them but what ``let_go`` frees.

        Nobody may allocate meanwhile: memory goes before the books know, since a neighbour waits for the one only.

        Raises:
            VmmError: the driver failed. What is unmapped is not handed out, and all has been let go.
        """
        chosen = [range(page, page + 1) for page in sorted(pages)]
        if not chosen:
            return 0
        try:
            self.elastic.shrink(chosen)
        finally:
            if let_go is not None:
                let_go()
            self.merge_and_sort_free()
            mapped = np.zeros(self.elastic.pages.num_pages, dtype=bool)
            mapped[list(self.elastic.pages.mapped_pages)] = True
            keep = torch.from_numpy(mapped).to(self.device)
            self.free_pages = self.free_pages[keep[self.layout.pages(self.free_pages)]]
        return len(chosen)

    def rehearse(self) -> None:
        """Grow by a page and give it back, if there is one.

        A card loads a kernel when it is first used: 50 to 90 ms in all, for which a neighbour that needs memory, or the
        first request after a wake, would wait.
        """
        ranges = self.elastic.grow_up_to(1)
        self.add_blocks(ranges)
        new = {blocks.start // self.elastic.pages.blocks_per_page for blocks in ranges}
        self.drop_pages(page for page in self.empty_pages() if page in new)

    def drop_all(self) -> None:
        """Sleep: no block is usable any more. Only when nothing is used."""
        assert self.used_blocks() == 0, f"{self.used_blocks()} blocks are in use"
        try:
            self.elastic.close_all()
        finally:
            self.clear()

    def reopen(self) -> bool:
        """Wake: block 0's page is mapped again. False on shortage."""
        ranges = self.elastic.open()
        if ranges is None:
            return False
        self.add_blocks(ranges)
        return True

    def check(self) -> None:
        ids = torch.cat((self.free_pages, self.release_pages)).cpu().numpy()
        blocks = self.layout.blocks(ids)
        assert len(np.unique(ids)) == len(ids), "a block is twice in the free list"
        assert bool((self.layout.ids(blocks) == ids).all()), "a free slot lies between two planes"
        assert all(map(self.elastic.pages.is_usable, blocks.tolist())), "a free block is on an unmapped page"
        assert 0 not in ids, "the padding block is in the free list"
        self.elastic.check()


class ElasticTokenAllocator(ElasticBlocks, TokenToKVPoolAllocator):
    """``block_tokens = 1``."""

    def __init__(self, size: int, dtype: torch.dtype, device: str, kvcache: Any) -> None:
        # need_sort: frees go to release_pages, which the parent merges only when the sorted part runs short.
        super().__init__(size, dtype, device, kvcache, need_sort=True)


class ElasticPagedAllocator(ElasticBlocks, PagedTokenToKVPoolAllocator):
    """``block_tokens > 1``."""

    def __init__(self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache: Any) -> None:
        super().__init__(size, page_size, dtype, device, kvcache, need_sort=True)

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        if self.device != "cpu":
            return super().alloc_extend(  # type: ignore[no-any-return]
                prefix_lens,
                prefix_lens_cpu,
                seq_lens,
                seq_lens_cpu,
                last_loc,
                extend_num_tokens,
                num_new_pages,
            )
        needed = get_num_new_pages(
            seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
        )
        if needed > len(self.free_pages):
            self.merge_and_sort_free()
        if needed > len(self.free_pages):
            return None
        out = torch.empty((extend_num_tokens,), dtype=torch.int64)
        # SGLang's own device-neutral twin of its Triton kernel (allocator/paged.py:45).
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device)
        self.free_pages = self.free_pages[needed:]
        return out

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        if self.device != "cpu":
            return super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)  # type: ignore[no-any-return]
        # A request whose new token is the first of a block takes a block; the others go on after last_loc.
        opens_block = (seq_lens - 1) % self.page_size == 0
        needed = int(opens_block.sum())
        if needed > len(self.free_pages):
            self.merge_and_sort_free()
        if needed > len(self.free_pages):
            return None
        out: torch.Tensor = (last_loc + 1).to(torch.int64)
        out[opens_block] = self.free_pages[:needed] * self.page_size
        self.free_pages = self.free_pages[needed:]
        return out


ElasticAllocator = ElasticTokenAllocator | ElasticPagedAllocator


def build_allocator(
    size: int, *, page_size: int, dtype: torch.dtype, device: str, kvcache: Any
) -> ElasticAllocator:
    """The allocator for either block size, in the place of SGLang's (kv_cache_configurator.py:1456)."""
    if page_size == 1:
        return ElasticTokenAllocator(size, dtype, device, kvcache)
    return ElasticPagedAllocator(size, page_size, dtype, device, kvcache)
