"""Two elastic pools on one budget, with a driver that fails at a drawn call, against ``{page: owner}``.

The pages are real memory. After every step, failed or not, the books of pages, arena and ledger agree, and each
mapped page still holds what its owner wrote there.
"""

from __future__ import annotations

import ctypes
import errno
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.allocator.page_pool import PagePool
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.errors import VmmError
from tests.allocator.failing_calls import FailingCalls

NUM_PAGES = 6
BUDGET = 8  # less than both pools together
owners = st.integers(0, 1)


class ElasticPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = str(Path(self.folder.name) / "ledger")
        self.ledger = Ledger.create(path, BUDGET * GRANULE_BYTES, "host0")
        self.calls = FailingCalls()
        self.pools = [self.make_pool(name) for name in ("chat", "code")]
        self.model: dict[tuple[int, int], int] = {}  # (owner, page) -> what was written there
        self.written = 0

    def make_pool(self, name: str) -> ElasticPool:
        owner = self.ledger.join(name, floor=0, ceiling=BUDGET, priority=0, bell="")
        # The last page holds one block only.
        pages = PagePool(page_bytes=GRANULE_BYTES, blocks_per_page=3, num_blocks=3 * NUM_PAGES - 2)
        return ElasticPool(HostArena(name, NUM_PAGES, GRANULE_BYTES, self.calls), owner, pages)

    def teardown(self) -> None:
        self.calls.broken.clear()
        self.calls.fail_after = None
        for pool in self.pools:
            pool.close_all()
            assert pool.leased_granules == 0
            pool.vmm.close()
            pool.owner.leave()
        assert self.ledger.totals().free == BUDGET
        self.ledger.close()
        self.folder.cleanup()

    # -- the driver

    @rule(calls=st.integers(0, 6), number=st.sampled_from([errno.ENOMEM, errno.ENOSPC, errno.EINVAL]))
    def fail_at(self, calls: int, number: int) -> None:
        self.calls.fail_after, self.calls.errno = calls, number

    @rule(name=st.sampled_from(["allocate", "map", "hide", "punch"]))
    def break_call(self, name: str) -> None:
        self.calls.broken.add(name)

    @rule()
    def repair(self) -> None:
        self.calls.broken.clear()
        self.calls.fail_after = None

    # -- the pool

    @rule(who=owners)
    def open(self, who: int) -> None:
        pool = self.pools[who]
        if pool.is_open:
            return
        before = self.usable(who)
        try:
            ranges = pool.open()
        except VmmError:
            self.unchanged(who)
            return
        if ranges is None:
            self.unchanged(who)
        else:
            self.took(who, ranges, before)

    @rule(who=owners, num_pages=st.integers(0, NUM_PAGES), all_or_nothing=st.booleans())
    def grow(self, who: int, num_pages: int, all_or_nothing: bool) -> None:
        pool = self.pools[who]
        if not pool.is_open:
            return
        before, free = self.usable(who), self.ledger.totals().free
        num_before = len(pool.pages.mapped_pages)
        try:
            ranges = pool.grow(num_pages) if all_or_nothing else pool.grow_up_to(num_pages)
        except VmmError:
            self.unchanged(who)
            return
        grown = len(pool.pages.mapped_pages) - num_before
        assert grown in ((0, num_pages) if all_or_nothing else range(num_pages + 1))
        if ranges is None:
            self.unchanged(who)
            assert num_pages > min(free, NUM_PAGES - num_before) or self.calls.made
        else:
            self.took(who, ranges, before)

    @rule(who=owners, pages=st.sets(st.integers(0, NUM_PAGES - 1)))
    def shrink(self, who: int, pages: set[int]) -> None:
        pool = self.pools[who]
        pages = {page for page in pages if pool.pages.is_mapped(page) and page != pool.pages.pinned_page}
        if not pool.is_open:
            return
        before = self.usable(who)
        try:
            ranges = pool.shrink([range(page, page + 1) for page in pages])
        except VmmError:
            pass
        else:
            assert not any(pool.pages.is_mapped(page) for page in pages)
            assert _flat(ranges) == sorted(before - self.usable(who))
        self.lost(who, pages)

    @rule(who=owners)
    def close(self, who: int) -> None:
        try:
            self.pools[who].close_all()
        except VmmError:
            pass
        else:
            assert not self.pools[who].pages.mapped_pages
        self.lost(who, set(range(NUM_PAGES)))

    # -- what must be true after each

    @invariant()
    def agrees(self) -> None:
        self.ledger.check()
        for who, pool in enumerate(self.pools):
            pool.check()
            assert pool.pages.mapped_pages == {page for owner, page in self.model if owner == who}
            assert pool.owner.held(Kind.KV) == pool.leased_granules
        for (who, page), value in self.model.items():
            assert self.word(who, page).value == value
        physical = sum(pool.vmm.physical_bytes() for pool in self.pools)
        assert physical <= BUDGET * GRANULE_BYTES
        self.calls.made.clear()

    def usable(self, who: int) -> set[int]:
        return set(_flat(self.pools[who].usable_ranges()))

    def word(self, who: int, page: int) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(self.pools[who].vmm.base + page * GRANULE_BYTES)

    def unchanged(self, who: int) -> None:
        mapped = {page for owner, page in self.model if owner == who}
        assert self.pools[who].pages.mapped_pages == mapped

    def took(self, who: int, ranges: list[range], before: set[int]) -> None:
        assert _flat(ranges) == sorted(self.usable(who) - before)
        for page in self.pools[who].pages.mapped_pages:
            if (who, page) not in self.model:
                assert self.word(who, page).value == 0, "a new page holds somebody's bytes"
                self.written += 1
                self.word(who, page).value = self.model[who, page] = self.written

    def lost(self, who: int, asked: set[int]) -> None:
        mapped = self.pools[who].pages.mapped_pages
        for owner, page in list(self.model):
            if owner == who and page not in mapped:
                assert page in asked
                del self.model[owner, page]


def _flat(ranges: list[range]) -> list[int]:
    return [number for r in ranges for number in r]


TestElasticPool = ElasticPoolMachine.TestCase
TestElasticPool.settings = settings(max_examples=200, stateful_step_count=25, deadline=None, derandomize=True)
