"""The lease of what an engine holds on its card beside pages: context, modules, graphs, workspaces, torch's memory.

The budget is the truth of the card only if this is in it. It is measured (the driver tells it for each process),
not computed, and leased before it is used where that can be foreseen: a model that loads, a pass that prefills. What
was not foreseen (prompts whose every token's probability is asked for) may come from what the budget has free, but
torch is capped so that it takes nothing that others have leased.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from prism_sgl.allocator.ledger import Kind
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.units import granules

if TYPE_CHECKING:
    from prism_sgl.engine.runtime_memory import RuntimeMemory

log = logging.getLogger(__name__)

_SETTLE_TIMEOUT_S = 10.0
# Torch's part is looked at so often while the engine works; it grows in the first passes and then stays.
_LOOK_EVERY_S = 0.5
_LOOK_AT_LEAST_EVERY_S = 5.0
# Torch may hold this much more than is leased and free: what it keeps for later is in pieces of its own sizes.
_TOLERATED_BYTES = 512 << 20
# Rows of float32 logits that stand at once: of the requests whose prefill ends in one pass, with a copy or two.
_LOGITS_ROWS = 128


class Overhead:
    """Owner of the lease of kind OVERHEAD. On the host there is none."""

    def __init__(self, memory: RuntimeMemory) -> None:
        self._memory = memory
        self._base_bytes = 0  # what is used beside torch's memory and pages, when last measured
        self._wanted_bytes = 0  # what the lease shall be
        self._looked_at = 0.0

    def __str__(self) -> str:
        torch_bytes = _torch_bytes() if self._base_bytes else 0
        held, leased = self._base_bytes + torch_bytes, self._memory.owner.held(Kind.OVERHEAD) * GRANULE_BYTES
        return f"{held >> 20} MiB, {torch_bytes >> 20} of them torch's ({leased >> 20} leased)"

    def settle(self, allowance_bytes: int, timeout_s: float = _SETTLE_TIMEOUT_S) -> bool:
        """Lease what is used now and ``allowance_bytes`` more that soon may be; False if others did not give it.

        What they did not give in time is asked for again by ``look``.
        """
        memory = self._memory
        used_bytes = memory.device.used_bytes() - memory.pages_bytes()
        if used_bytes <= 0:
            return True
        self._base_bytes = used_bytes - _torch_bytes()
        self._wanted_bytes = used_bytes + allowance_bytes
        return self._lease(timeout_s)

    def cap(self) -> None:
        """Keep torch within the budget: once the engine is complete, for loading and capture take what they take."""
        if self._base_bytes:
            self._cap(_torch_bytes())

    def look(self, *, in_a_hurry: bool) -> None:
        """At safe points: torch may have taken more than was foreseen. That is true already, so lease it.

        ``in_a_hurry``: somebody waits for a first token, which asking torch makes later; rather in another turn.
        """
        every_s = _LOOK_AT_LEAST_EVERY_S if in_a_hurry else _LOOK_EVERY_S
        if not self._base_bytes or time.monotonic() - self._looked_at < every_s:
            return
        self._looked_at = time.monotonic()
        torch_bytes = _torch_bytes()
        used_bytes = self._base_bytes + torch_bytes
        if used_bytes > self._wanted_bytes:
            log.warning("the engine holds %d MiB beside pages, more than foreseen", used_bytes >> 20)
            self._wanted_bytes = used_bytes
        if granules(self._wanted_bytes) > self._memory.owner.held(Kind.OVERHEAD):
            self._lease(0.0)
        self._cap(torch_bytes)

    def _cap(self, torch_bytes: int) -> None:
        leased_bytes = self._memory.owner.held(Kind.OVERHEAD) * GRANULE_BYTES - self._base_bytes
        free_bytes = self._memory.ledger.totals().free * GRANULE_BYTES
        self._memory.device.cap_torch(max(leased_bytes, torch_bytes) + free_bytes + _TOLERATED_BYTES)

    def _lease(self, timeout_s: float) -> bool:
        owner = self._memory.owner
        missing = granules(self._wanted_bytes) - owner.held(Kind.OVERHEAD)
        if missing < 0:
            owner.release(Kind.OVERHEAD, -missing)
        if missing <= 0:
            return True
        got = self._memory.insist(
            lambda: owner.try_reserve(Kind.OVERHEAD, missing), missing * GRANULE_BYTES, timeout_s
        )
        return got is not None


def prefill_bytes(model_config: Any, chunk_tokens: int) -> int:
    """What activations of one prefill pass take at most: the widest moment of a decoder layer (gate and up rows,
    their product, a few rows of the hidden size), two bytes a number, and the logits.

    Measured 692 MiB for 8192 tokens of a 1B whose vocabulary is 128k (docs/benchmarks.md), where this says 703.
    """
    text = model_config.hf_text_config
    hidden = int(model_config.hidden_size)
    wide = int(getattr(text, "intermediate_size", 4 * hidden))
    logits_bytes = _LOGITS_ROWS * int(model_config.vocab_size) * 4
    return chunk_tokens * (3 * wide + 8 * hidden) * 2 + logits_bytes


def _torch_bytes() -> int:
    """``torch.cuda.memory_reserved``, which sorts a hundred names first."""
    stats = torch.cuda.memory_stats_as_nested_dict()
    return int(stats["reserved_bytes"]["all"]["current"]) if stats else 0
