from __future__ import annotations

import pytest

from prism_sgl.allocator.page_pool import PagePool


def pool_of(page_bytes: int, block_bytes: int, num_blocks: int) -> PagePool:
    num_pages = -(-num_blocks * block_bytes // page_bytes)
    return PagePool(
        num_pages=num_pages, page_bytes=page_bytes, block_bytes=block_bytes, num_blocks=num_blocks
    )


def test_a_block_that_straddles_pages_needs_both() -> None:
    pool = pool_of(page_bytes=10, block_bytes=4, num_blocks=5)  # block 2 is bytes 8 to 11
    assert pool.pages_of_block(2) == range(0, 2)
    assert pool.blocks_of_page(0) == range(0, 3)
    assert pool.blocks_of_page(1) == range(2, 5)
    assert pool.mark_mapped([range(1)]) == [range(0, 2)]
    assert pool.mark_mapped([range(1, 2)]) == [range(2, 5)]
    assert pool.mark_unmapped([range(1)]) == [range(0, 3)]
    assert pool.usable_blocks == 2
    pool.check()


def test_a_block_larger_than_a_page_needs_all_its_pages() -> None:
    pool = pool_of(page_bytes=10, block_bytes=25, num_blocks=4)
    assert pool.pinned_pages == range(0, 3)
    assert pool.mark_mapped([range(0, 2), range(3, 5)]) == []
    assert pool.mark_mapped([range(2, 3)]) == [range(0, 2)]
    pool.check()


def test_a_block_between_two_runs_counts_once() -> None:
    pool = pool_of(page_bytes=10, block_bytes=30, num_blocks=1)
    assert pool.mark_mapped([range(1, 2)]) == []
    assert pool.mark_mapped([range(0, 1), range(2, 3)]) == [range(0, 1)]
    assert pool.usable_blocks == 1
    assert pool.mark_unmapped([range(0, 1), range(2, 3)]) == [range(0, 1)]
    pool.check()


def test_the_lowest_pages_are_chosen_first() -> None:
    pool = pool_of(page_bytes=10, block_bytes=5, num_blocks=16)
    pool.mark_mapped([range(0, 1), range(3, 4)])
    assert pool.choose_unmapped(3) == [range(1, 3), range(4, 5)]
    assert pool.choose_unmapped(100) == [range(1, 3), range(4, 8)]
    assert pool.choose_unmapped(0) == []
    assert pool.mapped_pages == {0, 3}
    assert pool.usable_ranges() == [range(0, 2), range(6, 8)]


def test_pages_behind_the_last_block_are_never_chosen() -> None:
    pool = PagePool(num_pages=8, page_bytes=10, block_bytes=5, num_blocks=3)
    assert pool.choose_unmapped(8) == [range(0, 2)]


def test_wrong_pages_change_nothing() -> None:
    pool = pool_of(page_bytes=10, block_bytes=5, num_blocks=4)
    pool.mark_mapped([range(1)])
    for runs in ([range(0, 2)], [range(1, 3)], [range(-1, 0)]):
        with pytest.raises(ValueError):
            pool.mark_mapped(runs)
        with pytest.raises(ValueError):
            pool.mark_unmapped(runs)
    pool.check()
    assert pool.mapped_pages == {0}


def test_blocks_must_fit() -> None:
    with pytest.raises(ValueError, match="fit"):
        PagePool(num_pages=1, page_bytes=10, block_bytes=5, num_blocks=3)
    with pytest.raises(ValueError, match="positive"):
        PagePool(num_pages=1, page_bytes=10, block_bytes=0, num_blocks=3)
