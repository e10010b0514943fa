"""The rule that ties an arena to the ledger: reserve, then map; unmap, then return.

Both the KV pool and the weights go through here, so that the rule stands in one place: at every moment, also
when a call fails or the process dies between two steps, the lease covers what the arena holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_sgl.allocator import crash_points
from prism_sgl.allocator.ledger import Kind, Owner
from prism_sgl.allocator.vmm import GRANULE_BYTES, DeviceFullError, Vmm, num_pages_in

# What is given back goes to the ledger in steps, so that a neighbour who lacks little need not wait for the last page.
_UNMAPPED_AT_ONCE = 8


class Lease:
    """What one arena has of its owner's granules. Invariant: it is never less than what the arena holds."""

    def __init__(self, vmm: Vmm, owner: Owner, kind: Kind) -> None:
        if vmm.page_bytes % GRANULE_BYTES:
            raise ValueError(f"a page of {vmm.page_bytes} bytes is not a multiple of {GRANULE_BYTES}")
        self._vmm = vmm
        self._owner = owner
        self._kind = kind
        self._page_granules = vmm.page_bytes // GRANULE_BYTES
        self._granules = 0
        self.device_shortages = 0  # maps that found no memory where the ledger had room

    @property
    def granules(self) -> int:
        return self._granules

    def reserve(self, num_pages: int) -> bool:
        """Room in the ledger for this many pages more, to be mapped next; False on shortage."""
        granules = num_pages * self._page_granules
        if not self._owner.try_reserve(self._kind, granules):
            return False
        self._granules += granules
        return True

    def reserve_up_to(self, num_pages: int) -> int:
        """As many of these pages as there is room for; returns how many."""
        step = self._page_granules
        granules = self._owner.reserve_up_to(self._kind, num_pages * step, step=step)
        self._granules += granules
        return granules // step

    def map(self, runs: Sequence[range]) -> bool:
        """Map these reserved pages. False: the device was full; the reservation is returned, nothing has changed.

        Raises:
            VmmError: the driver failed otherwise. The reservation is returned as far as no memory is held.
        """
        assert self._granules >= self._held_granules() + num_pages_in(runs) * self._page_granules
        crash_points.crash_point("between_reserve_and_map")
        try:
            self._vmm.map(runs)
        except DeviceFullError:
            self.device_shortages += 1
            return False
        finally:
            self._return_surplus()
        return True

    def unmap(self, runs: Sequence[range]) -> None:
        """Unmap these pages and return what they held.

        Raises:
            VmmError: the driver failed. What no longer holds memory has been returned, the rest stays leased.
        """
        for part in _parts(runs, _UNMAPPED_AT_ONCE) or [[]]:  # none: the arena then frees what was stuck
            try:
                self._vmm.unmap(part)
            finally:
                crash_points.crash_point("between_unmap_and_return")
                self._return_surplus()

    def check(self) -> None:
        assert self._granules == self._held_granules(), (self._granules, self._held_granules())
        assert self._granules <= self._owner.held(self._kind)

    def _held_granules(self) -> int:
        return self._vmm.held_bytes // GRANULE_BYTES

    def _return_surplus(self) -> None:
        surplus = self._granules - self._held_granules()
        if surplus > 0:
            self._owner.release(self._kind, surplus)
            self._granules -= surplus


def _parts(runs: Sequence[range], num_pages: int) -> list[list[range]]:
    """The same pages in the same order, at most so many in each part."""
    pages = [range(page, page + 1) for run in runs for page in run]
    return [pages[start : start + num_pages] for start in range(0, len(pages), num_pages)]
