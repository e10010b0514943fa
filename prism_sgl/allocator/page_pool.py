"""Which pages of one KV arena are mapped, and which blocks can therefore be used. Bookkeeping only.

Block b lies on bytes ``[b * block_bytes, (b + 1) * block_bytes)``. A block need not divide a page and may be
larger than one, so it may straddle pages: it is usable when every page that it touches is mapped.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from prism_sgl.allocator.vmm import PageId, merge_runs

_UNMAPPED, _MAPPED = b"\0", b"\1"


class PagePool:
    """The page table of one arena.

    Invariants: a page is mapped or not, never both; ``usable_blocks`` counts exactly the blocks all of whose
    pages are mapped. The pages of block 0 are pinned: it is the engine's padding sink, written by every batch.
    """

    def __init__(self, *, num_pages: int, page_bytes: int, block_bytes: int, num_blocks: int) -> None:
        if min(num_pages, page_bytes, block_bytes, num_blocks) <= 0:
            raise ValueError("pages, blocks and their sizes must be positive")
        if num_blocks * block_bytes > num_pages * page_bytes:
            raise ValueError(f"{num_blocks} blocks of {block_bytes} bytes do not fit into {num_pages} pages")
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self._states = bytearray(num_pages)  # to search, _mapped to look up
        self._mapped: set[PageId] = set()
        self._usable_blocks = 0
        # Pages behind the last block would be mapped for nothing.
        self._end_page = self.pages_of_block(num_blocks - 1).stop

    @property
    def usable_blocks(self) -> int:
        return self._usable_blocks

    @property
    def mapped_pages(self) -> Set[PageId]:
        """A live view; not to be changed by the caller."""
        return self._mapped

    @property
    def pinned_pages(self) -> range:
        return self.pages_of_block(0)

    def is_mapped(self, page: int) -> bool:
        return page in self._mapped

    def is_pinned(self, page: int) -> bool:
        return page in self.pinned_pages

    def is_usable(self, block: int) -> bool:
        return all(page in self._mapped for page in self.pages_of_block(block))

    def pages_of_block(self, block: int) -> range:
        """Every page that the block touches."""
        first_byte = block * self.block_bytes
        return range(first_byte // self.page_bytes, _ceil(first_byte + self.block_bytes, self.page_bytes))

    def blocks_of_page(self, page: int) -> range:
        """Every block that touches the page."""
        return self._blocks_touching(range(page, page + 1))

    def choose_unmapped(self, num_pages: int) -> list[range]:
        """Up to ``num_pages`` unmapped pages that can hold blocks, lowest first: the highest then come free."""
        runs: list[range] = []
        start = 0
        while num_pages > 0 and (start := self._states.find(_UNMAPPED, start, self._end_page)) >= 0:
            stop = self._states.find(_MAPPED, start, self._end_page)
            stop = min(self._end_page if stop < 0 else stop, start + num_pages)
            runs.append(range(start, stop))
            num_pages -= stop - start
            start = stop
        return runs

    def mark_mapped(self, runs: Sequence[range]) -> list[range]:
        """These unmapped pages are mapped now; returns the blocks that became usable."""
        merged = self._checked(runs, mapped=False)
        self._mark(merged, _MAPPED)
        ranges = self._usable_touching(merged)
        self._usable_blocks += sum(map(len, ranges))
        return ranges

    def mark_unmapped(self, runs: Sequence[range]) -> list[range]:
        """These mapped pages are unmapped now; returns the blocks that stopped being usable."""
        merged = self._checked(runs, mapped=True)
        ranges = self._usable_touching(merged)
        self._mark(merged, _UNMAPPED)
        self._usable_blocks -= sum(map(len, ranges))
        return ranges

    def mapped_runs(self) -> list[range]:
        runs: list[range] = []
        start = 0
        while (start := self._states.find(_MAPPED, start)) >= 0:
            stop = self._states.find(_UNMAPPED, start)
            stop = self.num_pages if stop < 0 else stop
            runs.append(range(start, stop))
            start = stop
        return runs

    def usable_ranges(self) -> list[range]:
        """All usable blocks, ascending."""
        return self._usable_touching(self.mapped_runs())

    def check(self) -> None:
        assert self._mapped == {page for page, state in enumerate(self._states) if state == _MAPPED[0]}
        assert set(self._states) <= {_UNMAPPED[0], _MAPPED[0]}
        usable = [block for block in range(self.num_blocks) if self.is_usable(block)]
        assert usable == [block for r in self.usable_ranges() for block in r]
        assert self._usable_blocks == len(usable), (self._usable_blocks, len(usable))

    def _usable_touching(self, mapped: Sequence[range]) -> list[range]:
        """The usable blocks that touch these mapped, ascending runs.

        Blocks inside a run are usable; only one block at each edge reaches over it and must be looked at.
        """
        ranges: list[range] = []
        start = 0  # blocks below were counted with an earlier run: a block may touch several
        for run in mapped:
            touching = self._blocks_touching(run)
            start, stop = max(start, touching.start), touching.stop
            if start < stop and not self.is_usable(start):
                start += 1
            if start < stop and not self.is_usable(stop - 1):
                stop -= 1
            if start < stop:
                ranges.append(range(start, stop))
                start = stop
        return ranges

    def _blocks_touching(self, run: range) -> range:
        first = min(run.start * self.page_bytes // self.block_bytes, self.num_blocks)
        return range(first, min(_ceil(run.stop * self.page_bytes, self.block_bytes), self.num_blocks))

    def _checked(self, runs: Sequence[range], *, mapped: bool) -> list[range]:
        merged = merge_runs(runs)
        for run in merged:
            if run.start < 0 or run.stop > self.num_pages:
                raise ValueError(f"there are no pages {run}")
            if self._states.find(_UNMAPPED if mapped else _MAPPED, run.start, run.stop) >= 0:
                raise ValueError(f"pages {run} are {'not all' if mapped else 'partly'} mapped")
        return merged

    def _mark(self, runs: Sequence[range], state: bytes) -> None:
        for run in runs:
            self._states[run.start : run.stop] = state * len(run)
            pages = map(PageId, run)
            if state == _MAPPED:
                self._mapped.update(pages)
            else:
                self._mapped.difference_update(pages)


def _ceil(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes)
