"""What a model holds on a device at least: one set of formulas for the checks of models.toml, placement and engine.

If they differed, the router would let two models be awake where the second then waits for memory for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prism_sgl.units import round_up

# SGLang admits a request only if strictly more than prompt + answer + one block is left
# (srt/managers/schedule_policy.py:1095), and block 0 is its padding sink.
_SPARE_BLOCKS = 3
_CUDA_OVERHEAD_BYTES = 2 << 30
# A page may waste this part of itself at its end; else it is made of several of the configured pages.
_MAX_WASTE = 1 / 16
_MAX_PAGES_JOINED = 16


@dataclass(frozen=True)
class KvPage:
    """The unit in which a model's KV is mapped: whole blocks, and what is left over at the end."""

    page_bytes: int
    blocks: int


def kv_page(block_bytes: int, page_bytes: int) -> KvPage:
    """The least multiple of ``page_bytes`` that blocks of this size fill well.

    ``block_bytes``: KV of ``block_tokens`` tokens, all layers. Where blocks do not divide the page, an eighth of one is
    kept for the layout, which begins each page at a multiple of one layer's share (engine/kv_layout.py).
    """
    best = KvPage(0, 0)
    for joined in range(1, _MAX_PAGES_JOINED + 1):
        size_bytes = joined * page_bytes
        spare_bytes = 0 if size_bytes % block_bytes == 0 else block_bytes // 8
        page = KvPage(size_bytes, (size_bytes - spare_bytes) // block_bytes)
        if page.blocks * block_bytes >= size_bytes * (1 - _MAX_WASTE):
            return page
        if page.blocks * best.page_bytes > best.blocks * page.page_bytes or not best.blocks:
            best = page
    if not best.blocks:  # a block larger than all that: pages as large as one needs
        size_bytes = round_up(block_bytes + block_bytes // 8, page_bytes)
        best = KvPage(size_bytes, 1)
    return best


def floor_bytes(*, request_tokens: int, block_tokens: int, token_bytes: int, page_bytes: int) -> int:
    """KV that one request of full length needs, in whole pages; one page where ``token_bytes`` is unknown (0)."""
    if not token_bytes:
        return page_bytes
    page = kv_page(token_bytes * block_tokens, page_bytes)
    num_blocks = -(-request_tokens // block_tokens) + _SPARE_BLOCKS
    return -(-num_blocks // page.blocks) * page.page_bytes


def overhead_bytes(kinds: Iterable[str]) -> int:
    """What an engine holds beside pages on a device of one of these kinds, before it can tell itself.

    On an H100 a Llama of 1B to 8B: 0.9 GiB of context, kernels and graphs, 0.6 to 1.1 GiB in a prefill of 8192
    tokens, and while it loads a step of 1 GiB twice (docs/benchmarks.md). The host's is not the budget's.
    """
    return _CUDA_OVERHEAD_BYTES if "cuda" in kinds else 0


def weights_bytes(size_bytes: int, page_bytes: int) -> int:
    """Weights as they are mapped: whole pages."""
    return round_up(size_bytes, page_bytes)
