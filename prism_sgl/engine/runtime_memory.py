"""What our code in SGLang's scheduler process holds: ledger slot, KV arena, weights arena, line to the worker.

One object a scheduler process, made when SGLang loads the model and found through ``RuntimeMemory.current()``,
because SGLang builds pools and models by itself and gives our code nothing to hold on to.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

from prism_sgl import addresses
from prism_sgl.allocator.doorbell import Doorbell
from prism_sgl.allocator.elastic_pool import ElasticPool
from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.allocator.page_pool import PagePool
from prism_sgl.allocator.vmm import GRANULE_BYTES, Vmm
from prism_sgl.allocator.weights import WeightsArena
from prism_sgl.engine.device import open_device
from prism_sgl.engine.first_tokens import FirstTokenTeller
from prism_sgl.engine.overhead import Overhead
from prism_sgl.engine.spec import current_spec
from prism_sgl.engine.strangers import LONGEST_RETRY_S, RETRY_S, Strangers
from prism_sgl.errors import PrismError
from prism_sgl.footprint import KvPage
from prism_sgl.messages import RuntimeSpec
from prism_sgl.units import granules

if TYPE_CHECKING:
    from prism_sgl.engine.arrival import Arrival
    from prism_sgl.engine.safe_point import SafePoint

log = logging.getLogger(__name__)
T = TypeVar("T")

# How often a waiting runtime looks again: a neighbour answers at its next safe point, a forward pass away.
_LOOK_AGAIN_S = 0.002
# A victim that needs longer than this drops running requests as well (safe_point.py).
TARGET_DEADLINE_S = 0.25
START_TIMEOUT_S = 120.0


class ShortageError(PrismError):
    """Memory did not come within the time given. The caller undoes its step; nothing is broken."""


class RuntimeMemory:
    """Owner of the ledger slot and of both arenas of this process, and what else its hooks share."""

    _current: ClassVar[RuntimeMemory | None] = None

    def __init__(self, spec: RuntimeSpec) -> None:
        self.spec = spec
        self.device = open_device(spec.device_kind)
        self.ledger = Ledger.open(spec.ledger_path)
        self.bell = Doorbell(addresses.doorbell(spec.run_dir, os.getpid()))
        ceiling = granules(spec.ceiling_bytes) if spec.ceiling_bytes else self.ledger.budget
        self.owner: Owner = self.ledger.join(
            spec.runtime,
            # Of a page at least: who has no KV at all yet has a right to what its start takes, as one has that wakes.
            floor=min(granules(max(spec.floor_bytes, spec.kv_page_bytes)), ceiling),
            ceiling=ceiling,
            priority=spec.priority,
            share=spec.kv_share,
            bell=addresses.doorbell(spec.run_dir, os.getpid()),
        )
        self.kv: ElasticPool | None = None
        self.weights: WeightsArena | None = None
        self.arrival: Arrival | None = None  # set with the weights
        self.overhead = Overhead(self)
        self.device_is_short = False  # in the last attempt that ``insist`` made
        self.strangers = Strangers(spec.device, self.ledger, self.device.free_granules)
        self.first_tokens = FirstTokenTeller(addresses.first_tokens(spec.run_dir, spec.runtime))
        self._told_late: list[str] = []
        self.safe_point: SafePoint | None = None  # set once the scheduler is complete (sleep_wake.bind)

    @classmethod
    def current(cls) -> RuntimeMemory:
        if cls._current is None:
            cls._current = cls(current_spec())
        return cls._current

    @property
    def kv_ceiling_bytes(self) -> int:
        """The most KV that this runtime may ever hold: the size of its reserved range."""
        budget_bytes = self.ledger.budget * GRANULE_BYTES
        beside = self.owner.held(Kind.WEIGHTS) + self.owner.held(Kind.OVERHEAD)
        room = budget_bytes - beside * GRANULE_BYTES
        return min(self.spec.ceiling_bytes or budget_bytes, room)

    def pages_bytes(self) -> int:
        """What the arenas of this process hold now."""
        return sum(part.vmm.held_bytes for part in (self.kv, self.weights) if part is not None)

    def weights_arena(self, size_bytes: int) -> Vmm:
        """Reserve the range of the weights; nothing is mapped. Whoever maps its pages fills them."""
        return self.device.arena(
            f"{self.spec.runtime}:weights", size_bytes, self.spec.weights_page_bytes, zeroed=False
        )

    def open_kv(self, page: KvPage, num_blocks: int) -> ElasticPool:
        """The KV arena, with the padding block's page mapped (kv_pool.py)."""
        pages = PagePool(page_bytes=page.page_bytes, blocks_per_page=page.blocks, num_blocks=num_blocks)
        size_bytes = pages.num_pages * page.page_bytes
        vmm = self.device.arena(f"{self.spec.runtime}:kv", size_bytes, page.page_bytes, zeroed=True)
        pool = self.kv = ElasticPool(vmm, self.owner, pages)
        if self.insist(pool.open, vmm.page_bytes, START_TIMEOUT_S) is None:
            raise ShortageError(
                f"{self.spec.model}: no room for the first page of KV{self.who_is_in_the_way()}"
            )
        return pool

    def insist(
        self, attempt: Callable[[], T | None], wanted_bytes: int | Callable[[], int], timeout_s: float
    ) -> T | None:
        """Try until it works or time is over, asking the neighbours for what is missing meanwhile.

        ``attempt`` returns None (or False) on shortage. If it then keeps what it got, ``wanted_bytes`` is a function
        that says what it still wants.
        """
        deadline = time.monotonic() + timeout_s
        asked_at = -math.inf
        pause_s = RETRY_S
        while True:
            shortages = self.device_shortages
            result = attempt()
            self.device_is_short = self.device_shortages > shortages
            enough = result is not None and result is not False
            self.strangers.look(self.device_is_short)
            if enough:
                return result
            now = time.monotonic()
            if now >= deadline:
                return None
            if now - asked_at > TARGET_DEADLINE_S:
                self.ask_neighbours(granules(wanted_bytes() if callable(wanted_bytes) else wanted_bytes))
                asked_at = now
            if self.device_is_short:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_RETRY_S)
            else:
                self.bell.wait(_LOOK_AGAIN_S)

    @property
    def device_shortages(self) -> int:
        """Maps of both arenas that found no memory where the ledger had room."""
        return sum(part.device_shortages for part in (self.kv, self.weights) if part is not None)

    def who_is_in_the_way(self) -> str:
        """What to add to the text of a shortage."""
        return "; another process holds the device's memory" if self.device_is_short else ""

    def ask_neighbours(self, wanted: int, *, page: int = 1) -> None:
        """Post reclaim targets for ``wanted`` granules in all, after what dead owners left has been taken back.

        ``page``: what is mapped at once, in granules, where it is KV that is wanted.
        """
        self.ledger.reap(self.device.free_granules())
        posted = self.owner.post_targets(wanted, TARGET_DEADLINE_S, page=page)
        late = self.owner.overdue_victims()  # after the posting, so that whom it passed over is among them
        if late and late != self._told_late:
            log.warning(
                "%s did not give memory within %g s; others are asked", ", ".join(late), TARGET_DEADLINE_S
            )
        self._told_late = late
        if posted:
            log.info("asked %s for memory", ", ".join(f"{p.name} ({p.granules} granules)" for p in posted))
