"""What a model holds on a device at least: one formula for the checks of models.toml, placement and the engine.

If they differed, the router would let two models be awake where the second then waits for memory for ever.
"""

from __future__ import annotations

from prism_sgl.units import round_up

# SGLang admits a request only if strictly more than prompt + answer + one block is left
# (srt/managers/schedule_policy.py:1095), and block 0 is its padding sink.
_SPARE_BLOCKS = 3


def floor_bytes(*, request_tokens: int, block_tokens: int, token_bytes: int, page_bytes: int) -> int:
    """KV that one request of full length needs: whole pages, and one more for blocks that straddle."""
    tokens = request_tokens + _SPARE_BLOCKS * block_tokens
    return round_up(tokens * token_bytes, page_bytes) + page_bytes


def weights_bytes(size_bytes: int, page_bytes: int) -> int:
    """Weights as they are mapped: whole pages."""
    return round_up(size_bytes, page_bytes)
