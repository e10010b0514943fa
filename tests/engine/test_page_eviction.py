"""A reclaim of a few pages costs a few pages' worth of prefix cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.chunk_cache import ChunkCache

from prism_sgl.engine.page_eviction import Eviction, Look
from tests.engine.elastic_fixture import PAGE, Elastic, make_elastic

TOKEN = 32 * 1024  # 64 tokens a page


@pytest.fixture(params=[1, 16])
def elastic(request: pytest.FixtureRequest, tmp_path: Path) -> Elastic:
    made = make_elastic(
        tmp_path, token_bytes=TOKEN, num_tokens=1600, block_tokens=request.param, budget_pages=30
    )
    made.grow(20)
    return made


def prompt(seed: int, length: int) -> list[int]:
    return [seed * 100_000 + i for i in range(length)]


def give_back(elastic: Elastic, pages: int) -> int:
    lost = evict(elastic, pages)
    assert elastic.tree.evictable_size() == elastic.tree.total_size()
    return lost


def evict(elastic: Elastic, pages: int) -> int:
    """Tokens lost. What is said to be empty afterwards is, and is all that is new."""
    before = elastic.allocator.empty_pages()
    eviction = Eviction(Look(elastic.tree, elastic.allocator), pages)
    cached = elastic.tree.evictable_size()
    eviction.carry_out()
    lost = cached - elastic.tree.evictable_size()
    elastic.allocator.check()
    assert eviction.pages == [page for page in elastic.allocator.empty_pages() if page not in before]
    return lost


def test_a_long_prompt_loses_its_tail_only(elastic: Elastic) -> None:
    elastic.cache(prompt(1, 640))  # ten pages and a bit
    empty = len(elastic.allocator.empty_pages())
    lost = give_back(elastic, 2)
    assert len(elastic.allocator.empty_pages()) == empty + 2
    assert lost <= 3 * 64
    assert elastic.cached(prompt(1, 640)) == 640 - lost


def test_what_running_requests_hold_stays(elastic: Elastic) -> None:
    from array import array

    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    elastic.cache(prompt(1, 320))
    elastic.cache(prompt(2, 320))
    held = elastic.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt(1, 320)))))
    elastic.tree.inc_lock_ref(held.last_device_node)
    evict(elastic, 30)
    assert elastic.cached(prompt(1, 320)) == 320
    # What shares a page with a held token cannot free it, so it is kept.
    assert elastic.cached(prompt(2, 320)) < 64


def test_evicting_everything_empties_every_page(elastic: Elastic) -> None:
    block = elastic.allocator.page_size
    shared = prompt(5, 96)
    for i in range(5):
        tail = prompt(10 + i, 96)
        new = elastic.allocator.alloc(96 if i else 192)
        assert new is not None
        elastic.allocator.free(new)
        ids = shared + tail
        have = elastic.cached(ids)
        slots = elastic.allocator.alloc(len(ids) - have)
        assert slots is not None
        from array import array

        import torch
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        prefix = elastic.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", ids)))).device_indices
        value = torch.cat((prefix, slots))
        elastic.tree.insert(InsertParams(key=RadixKey(array("q", ids)), value=value))
    assert elastic.tree.total_size() == 96 + 5 * 96
    lost = give_back(elastic, 30)
    assert lost == 96 + 5 * 96
    assert elastic.allocator.used_blocks() == 0
    assert len(elastic.allocator.empty_pages()) * PAGE == elastic.pool.mapped_bytes - PAGE
    assert block in (1, 16)


def test_without_a_prefix_cache_only_empty_pages_go(elastic: Elastic) -> None:
    """SGLang's cache under ``disable_radix_cache`` has no tree."""
    params = CacheInitParams(
        disable=True,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=elastic.allocator,
        page_size=elastic.allocator.page_size,
    )
    held = elastic.allocator.alloc(320)
    assert held is not None
    empty = elastic.allocator.empty_pages()
    look = Look(ChunkCache(params), elastic.allocator)
    look.prepare()
    assert look.holds
    assert elastic.allocator.empty_pages(look.used) == empty
    eviction = Eviction(look, 30)
    eviction.carry_out()
    assert eviction.pages == []
    assert elastic.allocator.empty_pages() == empty
    elastic.allocator.check()
    elastic.allocator.free(held)
    assert not look.holds


def test_cheap_pages_go_first(elastic: Elastic) -> None:
    """A page with a few cached tokens goes before one that would cost a whole shared prefix."""
    elastic.cache(prompt(1, 304))
    elastic.cache(prompt(2, 32))
    lost = give_back(elastic, 1)
    assert lost <= 128
    assert elastic.cached(prompt(1, 304)) >= 304 - 128


def test_random_trees_lose_whole_pages_and_nothing_that_is_held(elastic: Elastic) -> None:
    """Prompts that share beginnings, decoded side by side, some of them held by requests; several reclaims."""
    from array import array

    import numpy as np
    import torch
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    rng = np.random.default_rng(11)
    block = elastic.allocator.page_size
    held: list[list[int]] = []
    for family in range(6):
        shared = prompt(family, int(rng.integers(1, 5)) * 16)
        tails = [prompt(100 * family + 10 + n, 16 * int(rng.integers(1, 5))) for n in range(3)]
        slots = [[] for _ in tails]
        for step in range(0, max(map(len, tails)), block):  # side by side, as decoding requests take them
            for number, tail in enumerate(tails):
                if step < len(tail):
                    slots[number].append(elastic.allocator.alloc(block))
        for number, tail in enumerate(tails):
            ids = shared + tail
            prefix = elastic.tree.match_prefix(
                MatchPrefixParams(key=RadixKey(array("q", ids)))
            ).device_indices
            missing = len(shared) - len(prefix)
            head = [elastic.allocator.alloc(missing)] if missing > 0 else []
            value = torch.cat((prefix, *head, *slots[number]))
            elastic.tree.insert(InsertParams(key=RadixKey(array("q", ids)), value=value))
            if rng.random() < 0.2:
                node = elastic.tree.match_prefix(
                    MatchPrefixParams(key=RadixKey(array("q", ids)))
                ).last_device_node
                elastic.tree.inc_lock_ref(node)
                held.append(ids)
    assert held
    for goal in (1, 2, 5, 30):
        empty = len(elastic.allocator.empty_pages())
        total = elastic.tree.total_size()
        lost = evict(elastic, goal)
        gained = len(elastic.allocator.empty_pages()) - empty
        assert elastic.tree.total_size() == total - lost
        assert (lost > 0) == (gained > 0)
        assert all(elastic.cached(ids) == len(ids) for ids in held)
    # Nothing more can come free: every page left holds a token that is held, or block 0.
    assert evict(elastic, 1) == 0
