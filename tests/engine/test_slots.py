"""The free list holds blocks on mapped pages only, and hands out the lowest first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prism_sgl.errors import VmmError
from tests.engine.elastic_fixture import PAGE, Elastic, make_elastic

TOKEN = 24 * 1024 + 512  # does not divide a page


@pytest.fixture(params=[1, 16])
def elastic(request: pytest.FixtureRequest, tmp_path: Path) -> Elastic:
    return make_elastic(
        tmp_path, token_bytes=TOKEN, num_tokens=1600, block_tokens=request.param, budget_pages=24
    )


def test_available_size_follows_the_mapped_pages(elastic: Elastic) -> None:
    block = elastic.allocator.page_size
    per_page = PAGE // (TOKEN * block)
    assert elastic.allocator.available_size() == (per_page - 1) * block
    elastic.grow(3)
    assert elastic.allocator.available_size() == (4 * per_page - 1) * block
    elastic.allocator.check()


def test_a_failed_alloc_changes_nothing(elastic: Elastic) -> None:
    available = elastic.allocator.available_size()
    assert elastic.allocator.alloc(available + elastic.allocator.page_size) is None
    assert elastic.allocator.available_size() == available


def test_lowest_slots_go_first_and_whole_pages_come_free(elastic: Elastic) -> None:
    block = elastic.allocator.page_size
    elastic.grow(5)
    slots = elastic.allocator.alloc(elastic.allocator.available_size())
    assert slots is not None
    assert bool((slots[1:] > slots[:-1]).all())
    elastic.allocator.free(slots)
    again = elastic.allocator.alloc(10 * block)
    assert again is not None
    blocks = elastic.allocator.layout.blocks(again // block)
    assert int(blocks.max()) == 10
    empty = elastic.allocator.empty_pages()
    assert empty == sorted(empty, reverse=True)
    assert set(empty) >= {3, 4, 5}


def test_a_full_pool_hands_freed_slots_out_as_they_came(elastic: Elastic) -> None:
    """Nothing is sorted while a full prefix cache gives way to each request, and all of it once much is free."""
    block = elastic.allocator.page_size
    elastic.grow(5)
    slots = elastic.allocator.alloc(elastic.allocator.available_size())
    assert slots is not None
    low, high = slots[:block], slots[-block:]
    # SGLang's lists of blocks grow at their begins, of tokens at their ends.
    for freed in (high, low) if block == 1 else (low, high):
        elastic.allocator.free(freed)
        elastic.allocator.tidy()
    again = elastic.allocator.alloc(2 * block)
    assert again is not None and torch.equal(again, torch.cat((high, low)))
    elastic.allocator.check()
    elastic.allocator.free(slots)
    elastic.allocator.tidy()
    free = elastic.allocator.free_pages
    assert len(free) == len(slots) // block and bool((free[1:] > free[:-1]).all())
    elastic.allocator.check()


def test_given_back_pages_never_come_back_as_slots(elastic: Elastic) -> None:
    elastic.grow(5)
    held = elastic.allocator.alloc(16)
    assert held is not None
    given = elastic.allocator.drop_pages(elastic.allocator.empty_pages()[:4])
    assert given == 4
    assert elastic.pool.mapped_bytes == 2 * PAGE
    elastic.allocator.check()
    rest = elastic.allocator.alloc(elastic.allocator.available_size())
    assert rest is not None
    pages = elastic.allocator.layout.pages(torch.cat((held, rest)) // elastic.allocator.page_size)
    assert set(pages.tolist()) == {0, 1}
    assert elastic.allocator.alloc(elastic.allocator.page_size) is None


def test_a_neighbour_has_the_memory_before_the_books_are_done(elastic: Elastic) -> None:
    elastic.grow(3)
    held = elastic.allocator.alloc(elastic.allocator.available_size())
    assert held is not None
    before = elastic.ledger.totals().free
    seen = []

    def let_go() -> None:
        seen.append(elastic.ledger.totals().free - before)
        elastic.allocator.free(held)

    assert elastic.allocator.drop_pages([2, 3], let_go) == 2
    assert seen == [2]  # granules of 2 MiB
    elastic.allocator.check()
    assert elastic.allocator.used_blocks() == 0


def test_pages_that_the_driver_keeps_stay_in_the_books(
    elastic: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic.grow(3)
    held = elastic.allocator.alloc(elastic.allocator.available_size())
    assert held is not None

    def fail(runs: object) -> None:
        raise VmmError("the driver is unwell")

    with monkeypatch.context() as broken:
        broken.setattr(elastic.pool.vmm, "unmap", fail)
        with pytest.raises(VmmError):
            elastic.allocator.drop_pages([2, 3], lambda: elastic.allocator.free(held))
    elastic.allocator.check()
    assert elastic.allocator.used_blocks() == 0
    assert elastic.pool.mapped_bytes == 4 * PAGE


def test_virtual_size_counts_the_whole_range(elastic: Elastic) -> None:
    block = elastic.allocator.page_size
    assert elastic.allocator.virtual_available_size() == 1600
    slots = elastic.allocator.alloc(3 * block)
    assert elastic.allocator.virtual_available_size() == 1600 - 3 * block
    elastic.grow(2)
    assert elastic.allocator.virtual_available_size() == 1600 - 3 * block
    elastic.allocator.free(slots)
    elastic.allocator.drop_all()
    assert elastic.allocator.virtual_available_size() == 1600
    assert elastic.allocator.available_size() == 0
    assert elastic.pool.mapped_bytes == 0
    assert elastic.allocator.reopen()
    assert elastic.allocator.available_size() > 0


def test_decode_takes_a_block_only_when_one_is_full(tmp_path: Path) -> None:
    elastic = make_elastic(tmp_path, token_bytes=TOKEN, num_tokens=1600, block_tokens=16, budget_pages=24)
    allocator = elastic.allocator
    lens = torch.tensor([20, 32])
    last = torch.tensor([16 + 3, 2 * 16 + 15])
    before = allocator.available_size()
    out = allocator.alloc_decode(lens + 1, lens + 1, last)
    assert out is not None
    assert out[0] == 20  # goes on in its block
    assert out[1] % 16 == 0  # a fresh one
    assert before - allocator.available_size() == 16


def test_random_work_against_a_set(elastic: Elastic) -> None:
    """Grow, shrink, alloc and free in a fixed random order; a set of used slots is the model."""
    rng = np.random.default_rng(7)
    block = elastic.allocator.page_size
    used: list[torch.Tensor] = []
    model: set[int] = set()
    for _ in range(300):
        match rng.integers(4):
            case 0:
                elastic.allocator.add_blocks(elastic.pool.grow_up_to(int(rng.integers(1, 4))))
            case 1:
                empty = [p for p in elastic.allocator.empty_pages() if p > 0]
                elastic.allocator.drop_pages(empty[: int(rng.integers(0, 3))])
            case 2:
                slots = elastic.allocator.alloc(int(rng.integers(1, 8)) * block)
                if slots is not None:
                    taken = set(slots.tolist())
                    assert not taken & model
                    model |= taken
                    used.append(slots)
            case _:
                if used:
                    slots = used.pop(int(rng.integers(len(used))))
                    elastic.allocator.free(slots)
                    model -= set(slots.tolist())
        elastic.allocator.check()
        assert elastic.allocator.used_blocks() * block == len(model)


@pytest.mark.parametrize("pages", [0, 3])
def test_a_rehearsal_leaves_everything_as_it_was(
    elastic: Elastic, pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    elastic.grow(pages)
    before = elastic.allocator.available_size()
    unmapped: list[range] = []
    shrink = elastic.pool.shrink
    monkeypatch.setattr(elastic.pool, "shrink", lambda runs: (unmapped.extend(runs), shrink(runs))[1])
    elastic.allocator.rehearse()
    elastic.allocator.check()
    assert elastic.allocator.available_size() == before
    assert unmapped == [range(pages + 1, pages + 2)]  # one page more was there for a while


def test_a_rehearsal_with_nothing_to_be_had(elastic: Elastic) -> None:
    elastic.grow(elastic.pool.pages.num_pages - 1)
    before = elastic.pool.mapped_bytes
    elastic.allocator.rehearse()
    elastic.allocator.check()
    assert elastic.pool.mapped_bytes == before


def test_growing_by_nothing_costs_nothing(elastic: Elastic) -> None:
    """An engine that has all it may have asks for more at every turn."""
    elastic.grow(2)
    before = elastic.allocator.release_pages
    elastic.allocator.add_blocks([])
    assert elastic.allocator.release_pages is before
    assert elastic.allocator.unmapped_tokens() == elastic.allocator.size - elastic.allocator.usable_tokens()
