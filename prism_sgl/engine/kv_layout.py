"""Where each token's K and V lie in the arena, and which numbers SGLang knows them by.

A page holds ``blocks`` blocks of all layers, plane by plane: K of layer 0 for all its tokens, V of layer 0, K of layer
1, ... Each plane is a run of rows side by side, as in SGLang's own buffers, so kernels read them at the same speed
(token-major rows at a stride of all layers cost 1 % on an H100 and 5 % on a CPU, docs/benchmarks.md), and yet one
page is one map call for every layer.

The trick that keeps every view plain: all 2 x layers buffers are the same arena, seen from plane 0, 1, 2, ... on, each
a contiguous ``[rows, heads, dim]``. A token's number is its row in plane 0, so numbers have gaps where the other
planes of a page lie. SGLang's own page-major MLA layout does the same (srt/mem_cache/layout/page_major.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from prism_sgl.footprint import KvPage, kv_page

# SGLang's table of requests holds slot numbers as int32 (memory_pool.py, ReqToTokenPool), and kernels and allocators
# compute the number after a slot's. Offsets of bytes and elements are int64 everywhere.
MAX_ROWS = 2**31 - 1

Ids = TypeVar("Ids", torch.Tensor, "np.ndarray[tuple[int], np.dtype[np.int64]]")


@dataclass(frozen=True)
class KvLayout:
    """Blocks are counted densely (PagePool); ids are SGLang's (``token // block_tokens``), with gaps.

    Invariants: ``block(id(b)) == b``; the rows of different blocks and planes never overlap; no block reaches over
    the end of its page.
    """

    layers: int
    row_bytes: int  # one token, one layer, K or V
    block_tokens: int
    page: KvPage

    @classmethod
    def plan(cls, *, layers: int, row_bytes: int, block_tokens: int, page_bytes: int) -> KvLayout:
        """Where a page's blocks do not divide it, models of fewer than four layers lose one block of it."""
        block_bytes = 2 * layers * row_bytes * block_tokens
        page = kv_page(block_bytes, page_bytes)
        unit_bytes = row_bytes * block_tokens
        if page.page_bytes % unit_bytes and page.blocks * block_bytes + unit_bytes > page.page_bytes:
            page = KvPage(page.page_bytes, page.blocks - 1)
        if not page.blocks:
            raise ValueError(f"a block of {block_bytes} bytes does not fit into {page.page_bytes}")
        return cls(layers, row_bytes, block_tokens, page)

    @property
    def block_bytes(self) -> int:
        return 2 * self.layers * self._unit_bytes

    @property
    def plane_rows(self) -> int:
        """From one plane of a page to the next."""
        return self.page.blocks * self.block_tokens

    def num_rows(self, num_blocks: int) -> int:
        """Rows of each view: up to the last token's number."""
        return (int(self.ids(np.array([num_blocks - 1]))[0]) + 1) * self.block_tokens

    def ids(self, blocks: Ids) -> Ids:
        """SGLang's block numbers of these blocks."""
        pages = blocks // self.page.blocks
        return self._first_id(pages) + (blocks - pages * self.page.blocks)

    def blocks(self, ids: Ids) -> Ids:
        """The blocks of SGLang's block numbers."""
        pages = self.pages(ids)
        return pages * self.page.blocks + (ids - self._first_id(pages))

    def pages(self, ids: Ids) -> Ids:
        """The pages that they lie on."""
        return ids * self._unit_bytes // self.page.page_bytes

    def _first_id(self, pages: Ids) -> Ids:
        """A page begins with the first unit that lies in it whole."""
        return -(-pages * self.page.page_bytes // self._unit_bytes)

    @property
    def _unit_bytes(self) -> int:
        """One block in one plane: what numbers count in."""
        return self.row_bytes * self.block_tokens
