"""Evicting the prefix cache so that whole pages come free.

SGLang evicts leaf by leaf in LRU order and counts tokens; a page comes free only when all its tokens go, so that
way a reclaim of a few pages can cost the whole cache. Here the tree is read by page: for each mapped page whose
used blocks all belong to unlocked nodes, what would be lost is known, the cheapest pages go first, and a node
that only ends in the page loses its tail, not its head.

A neighbour waits meanwhile, and a cache that filled while many requests decoded side by side has every page shared
by all of them: so the tree is copied into arrays once, cuts are chosen on those, and carried out together at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prism_sgl.engine.slots import ElasticAllocator

Ints = npt.NDArray[np.int64]

# Costs are counted anew after this part of what is still missing has been chosen: a quarter loses 0.7 % more tokens
# than an eighth, and makes the reclaim of 64 pages 13 rounds instead of 27.
_ROUND = 4


def evict_pages(tree: Any, allocator: ElasticAllocator, num_pages: int) -> int:
    """Drop cached prefixes until ``num_pages`` more pages are empty or nothing is left to drop.

    ``tree`` is SGLang's RadixCache (srt/mem_cache/radix_cache.py:279). Returns the tokens lost.
    """
    nodes = _unlocked_nodes(tree)
    if num_pages <= 0 or not nodes:
        return 0
    cuts = _Cuts(nodes, allocator)
    cuts.choose(num_pages)
    return _carry_out(tree, allocator, nodes, cuts.keep)


class _Cuts:
    """How many blocks each node keeps. Nodes are counted as in the list, parents before children.

    Invariants: a node that loses a block loses all behind it and all nodes below it; ``left[p]`` counts the used
    blocks of page p that are not lost.
    """

    def __init__(self, nodes: list[Any], allocator: ElasticAllocator) -> None:
        block_tokens = allocator.page_size
        # One look at the device for all nodes.
        ids = torch.cat([node.value[::block_tokens] for node in nodes]) // block_tokens
        self._page_of: Ints = allocator.layout.pages(ids).cpu().numpy()
        self._length = np.array([len(node.value) // block_tokens for node in nodes], dtype=np.int64)
        self._start = np.concatenate(([0], np.cumsum(self._length)[:-1]))
        self.keep = self._length.copy()
        number = {id(node): index for index, node in enumerate(nodes)}
        self._children = [[number[id(child)] for child in node.children.values()] for node in nodes]
        self._is_flat = not any(self._children)

        self.left = allocator.used_per_page()
        cached = np.bincount(self._page_of, minlength=len(self.left))
        # Others hold blocks of the remaining pages: no eviction empties those.
        self._can_go = (cached == self.left) & (self.left > 0)
        # Pairs (page, node), and where in the node the page begins. Neighbouring blocks mostly share both.
        changes = np.flatnonzero(np.diff(self._page_of, prepend=-1))
        begins = np.union1d(changes, self._start[self._length > 0])
        node_of = np.searchsorted(self._start, begins, side="right") - 1
        pairs, first = np.unique(self._page_of[begins] * len(nodes) + node_of, return_index=True)
        wanted = self._can_go[pairs // len(nodes)]
        self._pair_page, self._pair_node = np.divmod(pairs[wanted], len(nodes))
        self._pair_first = begins[first[wanted]] - self._start[self._pair_node]
        # Equal costs: the least recently used first, then the highest page.
        age = np.zeros(len(self.left))
        times = np.array([node.last_access_time for node in nodes], dtype=float)
        np.maximum.at(age, self._pair_page, times[self._pair_node])
        self._rank = np.lexsort((-np.arange(len(self.left)), age)).argsort()

    def choose(self, num_pages: int) -> None:
        """Cut until so many pages are empty, or no more can be."""
        goal = min(num_pages, int(self._can_go.sum()))
        while (missing := goal - int((self._can_go & (self.left == 0)).sum())) > 0:
            pages = np.flatnonzero(self._can_go & (self.left > 0))
            order = np.lexsort((self._rank[pages], self._costs()[pages]))
            self._cut(pages[order[: max(1, missing // _ROUND)]])

    def _costs(self) -> Ints:
        """Blocks lost, for each page that would be emptied now."""
        below = self._below()
        lost = self.keep[self._pair_node] - self._pair_first
        costs = np.where(lost > 0, lost + below[self._pair_node], 0)
        total: Ints = np.bincount(self._pair_page, costs, minlength=len(self.left)).astype(np.int64)
        return total

    def _below(self) -> Ints:
        """Blocks of all nodes below each."""
        below = np.zeros_like(self.keep)
        if not self._is_flat:
            for index in range(len(self.keep) - 1, -1, -1):
                below[index] = sum(self.keep[child] + below[child] for child in self._children[index])
        return below

    def _cut(self, pages: Ints) -> None:
        """Every node loses what it has from its first block on these pages on."""
        here = np.isin(self._pair_page, pages)
        keep = self.keep.copy()
        np.minimum.at(keep, self._pair_node[here], self._pair_first[here])
        if not self._is_flat:
            for index, children in enumerate(self._children):
                if children and keep[index] < self._length[index]:
                    keep[children] = 0
        lost = self.keep - keep
        nodes = np.flatnonzero(lost)
        sizes = lost[nodes]
        # Positions [keep, old keep) of each of these nodes, one after the other.
        begins = np.repeat(
            self._start[nodes] + keep[nodes] - np.concatenate(([0], np.cumsum(sizes)[:-1])), sizes
        )
        gone = self._page_of[begins + np.arange(int(sizes.sum()))]
        self.left -= np.bincount(gone, minlength=len(self.left))
        self.keep = keep


def _carry_out(tree: Any, allocator: ElasticAllocator, nodes: list[Any], keep: Ints) -> int:
    """Take the cut tails and nodes out of the tree, children first; returns the tokens lost."""
    block_tokens = allocator.page_size
    lost = []
    for node, blocks in zip(reversed(nodes), reversed(keep.tolist()), strict=True):
        kept = blocks * block_tokens
        if kept == len(node.value):
            continue
        if kept:
            tree._split_node(node.key, node, kept)  # node is the tail now, its new parent the head
        lost.append(node.value)
        tree._delete_leaf(node)
        tree._record_remove_event(node)
    if not lost:
        return 0
    values = torch.cat(lost)
    # Tree values are block-aligned copies of a request's row (radix_cache.py:579), and so are they all together.
    allocator.free_segment(values, start_pos=0)
    return len(values)


def _unlocked_nodes(tree: Any) -> list[Any]:
    """Nodes that no running request holds, parents first. A lock covers all ancestors, so none below them is locked."""
    found = [tree.root_node]
    for member in found:
        found.extend(member.children.values())
    return [node for node in found[1:] if node.lock_ref == 0]
