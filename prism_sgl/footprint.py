"""What a model holds on a device at least: one formula for the checks of models.toml, placement and the engine.

If they differed, the router would let two models be awake where the second then waits for memory for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

from prism_sgl.units import round_up

# SGLang admits a request only if strictly more than prompt + answer + one block is left
# (srt/managers/schedule_policy.py:1095), and block 0 is its padding sink.
_SPARE_BLOCKS = 3
_CUDA_OVERHEAD_BYTES = 2 << 30


def floor_bytes(*, request_tokens: int, block_tokens: int, token_bytes: int, page_bytes: int) -> int:
    """KV that one request of full length needs: whole pages, and one more for blocks that straddle."""
    tokens = request_tokens + _SPARE_BLOCKS * block_tokens
    return round_up(tokens * token_bytes, page_bytes) + page_bytes


def overhead_bytes(kinds: Iterable[str]) -> int:
    """What an engine holds beside pages on a device of one of these kinds, before it can tell itself.

    On an H100 a Llama of 1B to 8B: 0.9 GiB of context, kernels and graphs, 0.6 to 1.1 GiB in a prefill of 8192
    tokens, and while it loads a step of 1 GiB twice (docs/benchmarks.md, residual.py). The host's is not the budget's.
    """
    return _CUDA_OVERHEAD_BYTES if "cuda" in kinds else 0


def weights_bytes(size_bytes: int, page_bytes: int) -> int:
    """Weights as they are mapped: whole pages."""
    return round_up(size_bytes, page_bytes)
