from __future__ import annotations

import pytest

from prism_sgl.allocator.page_pool import PagePool


def pool_of(blocks_per_page: int, num_blocks: int) -> PagePool:
    return PagePool(page_bytes=10, blocks_per_page=blocks_per_page, num_blocks=num_blocks)


def test_a_page_brings_and_takes_its_blocks() -> None:
    pool = pool_of(4, 12)
    assert pool.num_pages == 3
    assert pool.mark_mapped([range(0, 1), range(2, 3)]) == [range(0, 4), range(8, 12)]
    assert (pool.is_usable(3), pool.is_usable(4), pool.is_usable(8)) == (True, False, True)
    assert pool.mark_mapped([range(1, 2)]) == [range(4, 8)]
    assert pool.mark_unmapped([range(1, 3)]) == [range(4, 12)]
    assert pool.usable_blocks == 4
    pool.check()


def test_the_last_page_may_hold_fewer_blocks() -> None:
    pool = pool_of(4, 9)
    assert pool.mark_mapped([range(0, 3)]) == [range(0, 9)]
    assert pool.mark_unmapped([range(2, 3)]) == [range(8, 9)]
    assert pool.usable_blocks == 8
    pool.check()


def test_the_lowest_pages_are_chosen_first() -> None:
    pool = pool_of(2, 16)
    pool.mark_mapped([range(0, 1), range(3, 4)])
    assert pool.choose_unmapped(3) == [range(1, 3), range(4, 5)]
    assert pool.choose_unmapped(100) == [range(1, 3), range(4, 8)]
    assert pool.choose_unmapped(0) == []
    assert pool.mapped_pages == {0, 3}
    assert pool.usable_ranges() == [range(0, 2), range(6, 8)]


def test_wrong_pages_change_nothing() -> None:
    pool = pool_of(2, 4)
    pool.mark_mapped([range(1)])
    for runs in ([range(0, 2)], [range(1, 3)], [range(-1, 0)]):
        with pytest.raises(ValueError):
            pool.mark_mapped(runs)
        with pytest.raises(ValueError):
            pool.mark_unmapped(runs)
    pool.check()
    assert pool.mapped_pages == {0}


def test_nothing_is_not_a_pool() -> None:
    for wrong in ({"page_bytes": 0}, {"blocks_per_page": 0}, {"num_blocks": 0}):
        with pytest.raises(ValueError, match="positive"):
            PagePool(**({"page_bytes": 10, "blocks_per_page": 2, "num_blocks": 3} | wrong))
