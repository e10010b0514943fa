"""Which pages of one KV arena are mapped, and which blocks can therefore be used. Bookkeeping only.

Every page holds the same number of blocks and no block reaches over a page's end: a page that comes free frees
nothing but its own blocks. Block b lies on page ``b // blocks_per_page``; where in it is the layout's business.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from prism_sgl.allocator.vmm import PageId, merge_runs

_UNMAPPED, _MAPPED = b"\0", b"\1"


class PagePool:
    """The page table of one arena.

    Invariants: a page is mapped or not, never both; ``usable_blocks`` counts exactly the blocks of mapped pages.
    Page 0 is pinned: block 0 is the engine's padding sink, written by every batch.
    """

    def __init__(self, *, page_bytes: int, blocks_per_page: int, num_blocks: int) -> None:
        """``num_blocks``: the last page may hold fewer than the others."""
        if min(page_bytes, blocks_per_page, num_blocks) <= 0:
            raise ValueError("pages and blocks must be positive")
        self.page_bytes = page_bytes
        self.blocks_per_page = blocks_per_page
        self.num_blocks = num_blocks
        self.num_pages = -(-num_blocks // blocks_per_page)
        self._states = bytearray(self.num_pages)  # to search, _mapped to look up
        self._mapped: set[PageId] = set()
        self._usable_blocks = 0

    @property
    def usable_blocks(self) -> int:
        return self._usable_blocks

    @property
    def mapped_pages(self) -> Set[PageId]:
        """A live view; not to be changed by the caller."""
        return self._mapped

    @property
    def pinned_page(self) -> PageId:
        return PageId(0)

    def is_mapped(self, page: int) -> bool:
        return page in self._mapped

    def is_usable(self, block: int) -> bool:
        return block // self.blocks_per_page in self._mapped

    def blocks_of(self, pages: range) -> range:
        """The blocks of neighbouring pages."""
        start, stop = pages.start * self.blocks_per_page, pages.stop * self.blocks_per_page
        return range(start, min(stop, self.num_blocks))

    def choose_unmapped(self, num_pages: int) -> list[range]:
        """Up to ``num_pages`` unmapped pages, lowest first: the highest then come free."""
        runs: list[range] = []
        start = 0
        while num_pages > 0 and (start := self._states.find(_UNMAPPED, start)) >= 0:
            stop = self._states.find(_MAPPED, start)
            stop = min(self.num_pages if stop < 0 else stop, start + num_pages)
            runs.append(range(start, stop))
            num_pages -= stop - start
            start = stop
        return runs

    def mark_mapped(self, runs: Sequence[range]) -> list[range]:
        """These unmapped pages are mapped now; returns the blocks that became usable."""
        return self._mark(self._checked(runs, mapped=False), _MAPPED)

    def mark_unmapped(self, runs: Sequence[range]) -> list[range]:
        """These mapped pages are unmapped now; returns the blocks that stopped being usable."""
        return self._mark(self._checked(runs, mapped=True), _UNMAPPED)

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
        return [self.blocks_of(run) for run in self.mapped_runs()]

    def check(self) -> None:
        assert self._mapped == {page for page, state in enumerate(self._states) if state == _MAPPED[0]}
        assert set(self._states) <= {_UNMAPPED[0], _MAPPED[0]}
        usable = [block for block in range(self.num_blocks) if self.is_usable(block)]
        assert usable == [block for r in self.usable_ranges() for block in r]
        assert self._usable_blocks == len(usable), (self._usable_blocks, len(usable))

    def _checked(self, runs: Sequence[range], *, mapped: bool) -> list[range]:
        merged = merge_runs(runs)
        for run in merged:
            if run.start < 0 or run.stop > self.num_pages:
                raise ValueError(f"there are no pages {run}")
            if self._states.find(_UNMAPPED if mapped else _MAPPED, run.start, run.stop) >= 0:
                raise ValueError(f"pages {run} are {'not all' if mapped else 'partly'} mapped")
        return merged

    def _mark(self, runs: Sequence[range], state: bytes) -> list[range]:
        blocks = [self.blocks_of(run) for run in runs]
        num_blocks = sum(map(len, blocks))
        for run in runs:
            self._states[run.start : run.stop] = state * len(run)
            pages = map(PageId, run)
            if state == _MAPPED:
                self._mapped.update(pages)
            else:
                self._mapped.difference_update(pages)
        self._usable_blocks += num_blocks if state == _MAPPED else -num_blocks
        return blocks
