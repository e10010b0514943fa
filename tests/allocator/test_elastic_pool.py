from __future__ import annotations

from collections.abc import Iterator

import pytest

from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.allocator.page_pool import PagePool
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.errors import VmmError
from tests.allocator.conftest import BUDGET, join
from tests.allocator.failing_calls import FailingCalls

GRANULE = 2 << 20
PAGE_BYTES = 2 * GRANULE
NUM_PAGES = 8


@pytest.fixture
def calls() -> FailingCalls:
    return FailingCalls()


@pytest.fixture
def pool(owner: Owner, calls: FailingCalls) -> Iterator[ElasticPool]:
    vmm = HostArena("kv", NUM_PAGES, PAGE_BYTES, calls)
    pages = PagePool(page_bytes=PAGE_BYTES, blocks_per_page=4, num_blocks=4 * NUM_PAGES)
    pool = ElasticPool(vmm, owner, pages)
    yield pool
    pool.check()
    vmm.close()


def test_opens_grows_shrinks_and_closes(pool: ElasticPool, owner: Owner) -> None:
    assert pool.open() == [range(0, 4)]
    assert pool.grow(2) == [range(4, 12)]
    assert (pool.mapped_bytes, pool.leased_granules, owner.held(Kind.KV)) == (3 * PAGE_BYTES, 6, 6)
    assert pool.vmm.physical_bytes() == 3 * PAGE_BYTES
    assert pool.shrink([range(1, 2)]) == [range(4, 8)]
    assert pool.usable_ranges() == [range(0, 4), range(8, 12)]
    assert pool.grow(1) == [range(4, 8)]
    assert pool.close_all() == [range(0, 12)]
    assert (pool.mapped_bytes, owner.held(Kind.KV), pool.vmm.physical_bytes()) == (0, 0, 0)
    assert pool.open() == [range(0, 4)]


def test_growing_is_all_or_nothing_and_growing_up_to_is_not(pool: ElasticPool, ledger: Ledger) -> None:
    other = join(ledger, "code")
    assert other.try_reserve(Kind.WEIGHTS, BUDGET - 7)
    assert pool.open() is not None
    assert pool.grow(3) is None
    assert pool.grow(NUM_PAGES) is None
    assert pool.leased_granules == 2
    assert pool.grow_up_to(5) == [range(4, 12)]
    assert pool.leased_granules == 6
    assert pool.grow_up_to(5) == []
    pool.check()
    other.release(Kind.WEIGHTS, BUDGET - 7)
    assert pool.grow_up_to(100) == [range(12, 4 * NUM_PAGES)]


def test_a_full_ledger_leaves_it_closed(pool: ElasticPool, ledger: Ledger) -> None:
    assert join(ledger, "code").try_reserve(Kind.WEIGHTS, BUDGET - 1)
    assert pool.open() is None
    assert not pool.is_open
    with pytest.raises(ValueError, match="closed"):
        pool.grow(1)


def test_a_full_device_is_a_shortage(pool: ElasticPool, calls: FailingCalls, owner: Owner) -> None:
    calls.fail_after = 0
    assert pool.open() is None
    assert pool.open() is not None
    calls.fail_after = 1
    assert pool.grow(2) is None
    calls.fail_after = 0
    assert pool.grow_up_to(2) == []
    assert owner.held(Kind.KV) == 2
    pool.check()


def test_another_driver_error_raises_and_leaves_true_books(
    pool: ElasticPool, calls: FailingCalls, owner: Owner
) -> None:
    assert pool.open() is not None
    calls.errno = 22
    calls.fail_after = 0
    with pytest.raises(VmmError):
        pool.grow(2)
    assert owner.held(Kind.KV) == 2
    pool.check()


def test_what_cannot_be_unmapped_stays_leased(pool: ElasticPool, calls: FailingCalls, owner: Owner) -> None:
    assert pool.open() is not None
    assert pool.grow(3) is not None
    calls.fail_after = 3  # hide and punch of page 1, hide of page 3, then its punch fails
    with pytest.raises(VmmError):
        pool.shrink([range(1, 2), range(3, 4)])
    assert pool.pages.mapped_pages == {0, 2}
    assert owner.held(Kind.KV) == 6  # two mapped pages and a stuck one
    pool.check()
    assert pool.grow(1) == [range(4, 8)]  # frees the stuck page on its way
    assert owner.held(Kind.KV) == 6
    pool.check()


def test_a_sleep_that_failed_can_be_repeated_or_taken_back(pool: ElasticPool, calls: FailingCalls) -> None:
    assert pool.open() is not None
    calls.broken = {"hide"}
    with pytest.raises(VmmError):
        pool.close_all()
    pool.check()
    assert pool.open() == []
    with pytest.raises(VmmError):
        pool.close_all()
    calls.broken = set()
    assert pool.close_all() == [range(0, 4)]
    assert pool.leased_granules == 0


def test_block_0_stays_while_open(pool: ElasticPool) -> None:
    assert pool.open() is not None
    assert pool.grow(1) is not None
    with pytest.raises(ValueError, match="block 0"):
        pool.shrink([range(0, 2)])
    with pytest.raises(ValueError, match="not mapped"):
        pool.shrink([range(1, 3)])
    with pytest.raises(ValueError, match="open"):
        pool.open()
    assert len(pool.pages.mapped_pages) == 2


def test_a_device_that_is_full_though_the_ledger_has_room_is_told(
    pool: ElasticPool, calls: FailingCalls, owner: Owner, ledger: Ledger
) -> None:
    assert pool.open() is not None
    calls.broken = {"allocate"}
    assert pool.grow_up_to(2) == []
    assert pool.device_shortages == 1
    assert owner.held(Kind.KV) == 2, "the lease in vain went back"
    calls.broken = set()
    assert len(pool.grow_up_to(1)) == 1
    other = join(ledger, "code")
    assert other.try_reserve(Kind.WEIGHTS, BUDGET - owner.held(Kind.KV))
    assert pool.grow_up_to(1) == []
    assert pool.device_shortages == 1, "the ledger's own shortage is nobody's fault"


def test_pages_must_be_whole_granules(owner: Owner) -> None:
    pages = PagePool(page_bytes=1 << 20, blocks_per_page=1, num_blocks=1)
    vmm = HostArena("kv", 1, 1 << 20)
    with pytest.raises(ValueError, match="multiple"):
        ElasticPool(vmm, owner, pages)
    vmm.close()
