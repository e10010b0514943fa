"""The page pool against a model simple enough to trust: a set of mapped pages, everything else computed from it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prism_sgl.allocator.page_pool import PagePool


def runs_of(pages: set[int]) -> list[range]:
    """One run a page, in no helpful order: the pool has to join them itself."""
    return [range(page, page + 1) for page in sorted(pages, key=lambda p: (p % 3, -p))]


class PagePoolMachine(RuleBasedStateMachine):
    @initialize(blocks_per_page=st.integers(1, 12), num_blocks=st.integers(1, 60))
    def make(self, blocks_per_page: int, num_blocks: int) -> None:
        self.pool = PagePool(page_bytes=7, blocks_per_page=blocks_per_page, num_blocks=num_blocks)
        self.page_of = {block: block // blocks_per_page for block in range(num_blocks)}
        self.mapped: set[int] = set()

    def usable(self) -> set[int]:
        return {block for block, page in self.page_of.items() if page in self.mapped}

    @rule(data=st.data())
    def map(self, data: st.DataObject) -> None:
        unmapped = [page for page in range(self.pool.num_pages) if page not in self.mapped]
        pages = set(data.draw(st.lists(st.sampled_from(unmapped), unique=True))) if unmapped else set()
        before = self.usable()
        ranges = self.pool.mark_mapped(runs_of(pages))
        self.mapped |= pages
        assert _flat(ranges) == sorted(self.usable() - before)

    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        pages = (
            set(data.draw(st.lists(st.sampled_from(sorted(self.mapped)), unique=True)))
            if self.mapped
            else set()
        )
        before = self.usable()
        ranges = self.pool.mark_unmapped(runs_of(pages))
        self.mapped -= pages
        assert _flat(ranges) == sorted(before - self.usable())

    @rule(num_pages=st.integers(0, 40))
    def grow(self, num_pages: int) -> None:
        runs = self.pool.choose_unmapped(num_pages)
        useful = sorted(set(self.page_of.values()) - self.mapped)
        assert _flat(runs) == useful[:num_pages]
        self.pool.mark_mapped(runs)
        self.mapped.update(_flat(runs))

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.mapped_pages == self.mapped
        assert self.pool.usable_blocks == len(self.usable())
        assert _flat(self.pool.usable_ranges()) == sorted(self.usable())
        for page in range(self.pool.num_pages):
            assert list(self.pool.blocks_of(range(page, page + 1))) == [
                block for block, of in self.page_of.items() if of == page
            ]


def _flat(ranges: list[range]) -> list[int]:
    return [number for r in ranges for number in r]


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(max_examples=150, stateful_step_count=20, deadline=None, derandomize=True)
