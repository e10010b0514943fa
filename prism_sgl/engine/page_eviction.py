"""Evicting the prefix cache so that whole pages come free.

SGLang evicts leaf by leaf in LRU order and counts tokens; a page comes free only when all its tokens go, so that
way a reclaim of a few pages can cost the whole cache. Here the tree is read by page: for each mapped page whose
used blocks all belong to unlocked nodes, what would be lost is known, the cheapest pages go first, and a node
that only ends in the page loses its tail, not its head.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from prism_sgl.engine.slots import ElasticAllocator


@dataclass(frozen=True)
class Cut:
    """Keep the first ``keep`` tokens of the node, drop the rest and everything below it."""

    node: Any
    keep: int
    lost_tokens: int


def evict_pages(tree: Any, allocator: ElasticAllocator, num_pages: int) -> int:
    """Drop cached prefixes until ``num_pages`` more pages are empty or nothing is left to drop.

    ``tree`` is SGLang's RadixCache (srt/mem_cache/radix_cache.py:279). Returns the tokens lost.
    """
    lost = 0
    goal = len(allocator.empty_pages()) + num_pages
    # Each look at the pages syncs with the device and sums over all blocks: once a round.
    while (missing := goal - len(allocator.empty_pages())) > 0:
        candidates = _candidates(tree, allocator)
        if not candidates:
            break
        touched: set[int] = set()
        for cuts in candidates:
            if missing <= 0:
                break
            if any(id(cut.node) in touched for cut in cuts):
                continue  # its cost changed with an earlier cut of this round; it is read anew in the next
            for cut in cuts:
                touched.update(id(node) for node in _subtree(cut.node))
                lost += _apply(tree, allocator, cut)
            missing -= 1
    return lost


def _candidates(tree: Any, allocator: ElasticAllocator) -> list[list[Cut]]:
    """For every page that eviction can empty: the cuts that do it. Cheapest first, then least recently used."""
    block_tokens = allocator.page_size
    used = allocator.used_per_page()
    cached: defaultdict[int, int] = defaultdict(int)  # page -> used blocks that unlocked nodes hold
    first: defaultdict[int, dict[int, int]] = defaultdict(dict)  # page -> {node index: first token in it}
    nodes = _unlocked_nodes(tree)
    pool = allocator.elastic.pages
    for index, node in enumerate(nodes):
        ids = node.value[::block_tokens] // block_tokens
        on_pages = allocator.layout.pages(ids).cpu().numpy()
        pages, starts, counts = np.unique(on_pages, return_index=True, return_counts=True)
        for page, start, count in zip(pages.tolist(), starts.tolist(), counts.tolist(), strict=True):
            cached[page] += count
            first[page][index] = start * block_tokens
    below = {id(node): sum(len(n.value) for n in _subtree(node)) - len(node.value) for node in nodes}
    ranked: list[tuple[int, float, int, list[Cut]]] = []
    for page, positions in first.items():
        if page not in pool.mapped_pages or cached[page] != used[page] or used[page] == 0:
            continue
        cuts = [
            Cut(nodes[i], keep, len(nodes[i].value) - keep + below[id(nodes[i])])
            for i, keep in positions.items()
        ]
        age = max(nodes[i].last_access_time for i in positions)
        ranked.append((sum(cut.lost_tokens for cut in cuts), age, -page, cuts))
    ranked.sort(key=lambda entry: entry[:3])
    return [cuts for *_, cuts in ranked]


def _unlocked_nodes(tree: Any) -> list[Any]:
    """Nodes that no running request holds. A node's lock covers its ancestors, so below them none is locked."""
    return [node for node in _subtree(tree.root_node) if node is not tree.root_node and node.lock_ref == 0]


def _subtree(node: Any) -> list[Any]:
    """The node and all below it, parents before children."""
    found = [node]
    for member in found:
        found.extend(member.children.values())
    return found


def _apply(tree: Any, allocator: ElasticAllocator, cut: Cut) -> int:
    """Carry out one cut; returns the tokens lost."""
    node = cut.node
    if node.parent is None or node.parent.children.get(node.key.child_key(tree.page_size)) is not node:
        return 0  # went with an earlier cut of the same page
    if cut.keep:
        tree._split_node(node.key, node, cut.keep)  # node is the tail now, its new parent the head
    lost = 0
    for member in reversed(_subtree(node)):
        # Tree values are block-aligned copies of a request's row: one segment each (radix_cache.py:579).
        allocator.free_segment(member.value, start_pos=0)
        lost += len(member.value)
        tree._delete_leaf(member)
        tree._record_remove_event(member)
    return lost
