"""The free lists on a card: in the steady state the host never waits for it, whatever the size of a block."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.grow import build_elastic, runs_without_sync
from benchmarks.gpu.nvml import GIB

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("block_tokens", [1, 16, 64])
def test_no_step_waits_for_the_card(block_tokens: int, tmp_path: Path) -> None:
    """Torch raises at any wait: alloc, alloc_extend, alloc_decode and frees as the engine calls them."""
    torch.zeros(1, device="cuda")
    tmp_path.chmod(0o700)
    allocator, parts = build_elastic(str(tmp_path), 2 * GIB, block_tokens)
    allocator.add_blocks(parts.pool.grow_up_to(parts.arena.num_pages))
    assert runs_without_sync(allocator, 1000) == ""
    allocator.check()
    allocator.drop_all()  # refuses while a block is in use
    parts.arena.close()
