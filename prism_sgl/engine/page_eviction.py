"""Evicting the prefix cache so that whole pages come free.

SGLang evicts leaf by leaf in LRU order and counts tokens; a page comes free only when all its tokens go, so that
way a reclaim of a few pages can cost the whole cache. Here the tree is read by page: for each mapped page whose
used blocks all belong to unlocked nodes, what would be lost is known, the cheapest pages go first, and a node
that only ends in the page loses its tail, not its head.

A neighbour waits meanwhile, and a cache that filled while many requests decoded side by side has every page shared
by all of them: so the tree is copied into arrays once, cuts are chosen on those, and carried out when the neighbour
has its memory already.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prism_sgl.engine.slots import ElasticAllocator

Ints = npt.NDArray[np.int64]

# Costs are counted anew after this part of what is still missing has been chosen: a quarter loses 0.7 % more tokens
# than an eighth, and makes the reclaim of 64 pages 13 rounds instead of 27.
_ROUND = 4


class Look:
    """What lies on which page at one moment. Good for one eviction, as long as it ``holds``.

    To wait for the device is to wait for a turn on the card, which takes milliseconds while another process computes
    there. So it is waited for once: the card makes one run of numbers, four bytes each, and the rest is done here.
    """

    def __init__(self, tree: Any, allocator: ElasticAllocator) -> None:
        """``tree`` is SGLang's RadixCache (srt/mem_cache/radix_cache.py:279), or its ChunkCache."""
        self.tree = tree
        self.allocator = allocator
        self.nodes = _unlocked_nodes(tree)
        self._lengths = [len(node.value) for node in self.nodes]
        self._free = allocator.free_pages, allocator.release_pages
        numbers = _numbers_of([node.value for node in self.nodes], allocator).cpu().numpy()
        num_pages = allocator.elastic.pages.num_pages
        self.used = allocator.used_per_page(numbers[:num_pages])
        self._node_pages = numbers[num_pages:]

    @functools.cached_property
    def cuts(self) -> _Cuts | None:
        """None: there is nothing to cut."""
        if not self.nodes:
            return None
        return _Cuts(self.nodes, self._node_pages, self.used, self.allocator.page_size)

    def prepare(self) -> None:
        """All that an eviction needs and that does not depend on how much of it."""
        _ = self.cuts

    @property
    def holds(self) -> bool:
        """Nothing was allocated, freed, cached or locked since. A list of free blocks that changes is a new one."""
        lists = self.allocator.free_pages, self.allocator.release_pages
        nodes = _unlocked_nodes(self.tree)
        return (
            all(now is then for now, then in zip(lists, self._free, strict=True))
            and len(nodes) == len(self.nodes)
            and all(now is then for now, then in zip(nodes, self.nodes, strict=True))
            and [len(node.value) for node in nodes] == self._lengths
        )


class Eviction:
    """Cached prefixes chosen to go, so that ``num_pages`` pages come free, or as many as can.

    Neither tree nor allocator may be used between the look and ``carry_out``.
    """

    def __init__(self, look: Look, num_pages: int) -> None:
        self._look = look
        self._keep: list[int] = []  # blocks that each node keeps
        self.pages: list[int] = []  # that hold nothing once it is carried out, highest first
        if num_pages > 0 and (cuts := look.cuts) is not None:
            self.pages = cuts.choose(num_pages)
            self._keep = cuts.keep[:-1].tolist()

    def carry_out(self) -> None:
        """Take the cut tails and nodes out of the tree, children first."""
        tree, allocator = self._look.tree, self._look.allocator
        lost = []
        for index in reversed(range(len(self._keep))):
            node, kept = self._look.nodes[index], self._keep[index] * allocator.page_size
            if kept == len(node.value):
                continue
            if kept:
                tree._split_node(node.key, node, kept)  # node is the tail now, its new parent the head
            lost.append(node.value)
            tree._delete_leaf(node)
            tree._record_remove_event(node)
        if lost:
            # Tree values are block-aligned copies of a request's row (radix_cache.py:579), and so are they together.
            allocator.free_segment(torch.cat(lost), start_pos=0)


def rehearse(allocator: ElasticAllocator) -> None:
    """Have the device load what a look at the tree needs (ElasticBlocks.rehearse says why)."""
    one = torch.zeros(allocator.page_size, dtype=torch.int64, device=allocator.device)
    _numbers_of([one] * 2, allocator).cpu()


class _Cuts:
    """How many blocks each node keeps. Nodes are counted as in the list, parents before children.

    Invariants: a node that loses a block loses all behind it and all nodes below it. One more node at the end stands
    for the parent of those that have none here; it has no blocks, so it loses none.
    """

    def __init__(self, nodes: list[Any], pages: npt.NDArray[np.int32], used: Ints, block_tokens: int) -> None:
        """``pages``: ``[blocks]``, of each block of these nodes, one node after the other."""
        self._length = np.array([len(node.value) // block_tokens for node in nodes] + [0], dtype=np.int64)
        start = np.concatenate(([0], np.cumsum(self._length[:-1])))
        self.keep = self._length.copy()
        self._find_parents(nodes)

        held = np.bincount(pages, minlength=len(used))
        is_begin = np.ones(len(pages), dtype=bool)
        np.not_equal(pages[1:], pages[:-1], out=is_begin[1:])
        is_begin[start[:-1]] = True
        begins = np.flatnonzero(is_begin)
        page_of = pages[begins].astype(np.int64)
        self._num_pages = len(used)
        # Others hold blocks of the remaining pages: no eviction empties those.
        self._can_go = (held == used) & (used > 0)
        # Pairs (page, node), and where in the node the page begins. Neighbouring blocks mostly share both.
        node_of = np.searchsorted(start[:-1], begins, side="right") - 1
        pairs, first = np.unique(page_of * len(nodes) + node_of, return_index=True)
        wanted = self._can_go[pairs // len(nodes)]
        self._pair_page, self._pair_node = np.divmod(pairs[wanted], len(nodes))
        self._pair_first = begins[first[wanted]] - start[self._pair_node]
        # Equal costs: the least recently used first, then the highest page.
        age = np.zeros(len(used))
        times = np.array([node.last_access_time for node in nodes], dtype=float)
        np.maximum.at(age, self._pair_page, times[self._pair_node])
        self._rank = np.lexsort((-np.arange(len(used)), age)).argsort()

    def choose(self, num_pages: int) -> list[int]:
        """Cut until so many pages are empty, or no more can be; returns those that are, highest first."""
        goal = min(num_pages, int(self._can_go.sum()))
        while True:
            costs = self._costs()
            emptied = self._can_go & (costs == 0)
            missing = goal - int(emptied.sum())
            if missing <= 0:
                return [int(page) for page in np.flatnonzero(emptied)[::-1]]
            pages = np.flatnonzero(self._can_go & (costs > 0))
            order = np.lexsort((self._rank[pages], costs[pages]))
            self._cut(pages[order[: max(1, missing // _ROUND)]])

    def _find_parents(self, nodes: list[Any]) -> None:
        number = {id(node): index for index, node in enumerate(nodes)}
        parents = [number.get(id(node.parent), len(nodes)) for node in nodes]
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent == len(nodes) else depths[parent] + 1)
        self._parent = np.array([*parents, len(nodes)])
        # Nodes whose parent is here too, by depth.
        self._levels = [np.flatnonzero(np.equal(depths, depth)) for depth in range(1, max(depths) + 1)]

    def _costs(self) -> Ints:
        """Blocks lost, for each page that would be emptied now; 0: it is empty."""
        lost = np.maximum(self.keep[self._pair_node] - self._pair_first, 0)
        if self._levels:
            lost += np.where(lost > 0, self._below()[self._pair_node], 0)
        costs: Ints = np.bincount(self._pair_page, lost, minlength=self._num_pages).astype(np.int64)
        return costs

    def _below(self) -> Ints:
        """Blocks of all nodes below each."""
        below = np.zeros_like(self.keep)
        for level in reversed(self._levels):
            np.add.at(below, self._parent[level], self.keep[level] + below[level])
        return below

    def _cut(self, pages: Ints) -> None:
        """Every node loses what it has from its first block on these pages on."""
        chosen = np.zeros(self._num_pages, dtype=bool)
        chosen[pages] = True
        here = chosen[self._pair_page]
        np.minimum.at(self.keep, self._pair_node[here], self._pair_first[here])
        for level in self._levels:
            parent = self._parent[level]
            self.keep[level[self.keep[parent] < self._length[parent]]] = 0


def _numbers_of(values: Sequence[torch.Tensor], allocator: ElasticAllocator) -> torch.Tensor:
    """``[num_pages + blocks]`` int32, on the device: free blocks of each page, then each page of the values' blocks."""
    parts = [allocator.free_per_page()]
    if values:
        ids = torch.cat(list(values))[:: allocator.page_size] // allocator.page_size
        parts.append(allocator.layout.pages(ids).to(torch.int32))
    return torch.cat(parts)


def _unlocked_nodes(tree: Any) -> list[Any]:
    """Nodes that no running request holds, parents first. A lock covers all ancestors, so none below them is locked."""
    if tree.is_chunk_cache():
        return []  # the radix cache is off: no prefix outlives its request, and there is no tree
    found = [tree.root_node]
    for member in found:
        found.extend(member.children.values())
    return [node for node in found[1:] if node.lock_ref == 0]
