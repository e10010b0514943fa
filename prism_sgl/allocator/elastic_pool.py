"""One KV arena that grows and shrinks: pages, memory and lease kept in step.

Shortage is a value (None), a failing driver is an exception, and after either the three still agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism_sgl.allocator.lease import Lease
from prism_sgl.allocator.ledger import Kind, Owner
from prism_sgl.allocator.page_pool import PagePool
from prism_sgl.allocator.vmm import Vmm, merge_runs, num_pages_in


class ElasticPool:
    """Invariants: ``pages`` says mapped exactly where ``vmm`` does; the lease covers what ``vmm`` holds; while
    open, the page of block 0 is mapped, and while closed no page is, unless the driver could not unmap it.
    """

    def __init__(self, vmm: Vmm, owner: Owner, pages: PagePool) -> None:
        if (vmm.num_pages, vmm.page_bytes) != (pages.num_pages, pages.page_bytes):
            raise ValueError("the page pool is of another arena")
        self.vmm = vmm
        self.owner = owner
        self.pages = pages
        self._lease = Lease(vmm, owner, Kind.KV)
        self._open = False

    @property
    def is_open(self) -> bool:
        return self._open

    @property
    def mapped_bytes(self) -> int:
        return len(self.pages.mapped_pages) * self.pages.page_bytes

    @property
    def device_shortages(self) -> int:
        """So often the device had no memory for what the ledger had granted: somebody outside the ledger holds it."""
        return self._lease.device_shortages

    @property
    def leased_granules(self) -> int:
        return self._lease.granules

    def usable_ranges(self) -> list[range]:
        """All blocks on mapped pages, ascending."""
        return self.pages.usable_ranges()

    def open(self) -> list[range] | None:
        """Map the page of block 0; returns the blocks that are usable now, None on shortage."""
        if self._open:
            raise ValueError("the pool is open")
        page = self.pages.pinned_page
        # A page that close_all could not unmap is still there, and still leased.
        pinned = [] if self.pages.is_mapped(page) else [range(page, page + 1)]
        if not self._lease.reserve(num_pages_in(pinned)):
            return None
        ranges = self._map(pinned)
        self._open = ranges is not None
        return ranges

    def grow(self, num_pages: int) -> list[range] | None:
        """Map this many pages more, lowest first; returns the blocks that became usable, None on shortage."""
        self._insist_open()
        runs = self.pages.choose_unmapped(num_pages)
        if num_pages_in(runs) < num_pages or not self._lease.reserve(num_pages):
            return None
        return self._map(runs)

    def grow_up_to(self, num_pages: int) -> list[range]:
        """Map as many of these pages as the budget allows now; returns the blocks that became usable."""
        self._insist_open()
        wanted = num_pages_in(self.pages.choose_unmapped(num_pages))
        reserved = self._lease.reserve_up_to(wanted)
        return (self._map(self.pages.choose_unmapped(reserved)) or []) if reserved else []

    def shrink(self, runs: Sequence[range]) -> list[range]:
        """Give these mapped pages back; returns the blocks that are no longer usable.

        The caller makes sure that nothing uses them, a forward in flight included.

        Raises:
            ValueError: a page is pinned or not mapped. Nothing has changed.
            VmmError: the driver failed; pages and lease say how far it came.
        """
        self._insist_open()
        merged = merge_runs(runs)
        if any(self.pages.pinned_page in run for run in merged):
            raise ValueError("the page of block 0 stays mapped while the pool is open")
        return self._unmap(merged)

    def close_all(self) -> list[range]:
        """Sleep: give all pages back, block 0's too. Returns the blocks that are no longer usable."""
        self._open = False
        return self._unmap(self.pages.mapped_runs())

    def check(self) -> None:
        self.pages.check()
        self.vmm.check()
        self._lease.check()
        for page in range(self.pages.num_pages):
            assert self.pages.is_mapped(page) == self.vmm.is_mapped(page), page
        if self._open:
            assert self.pages.is_mapped(self.pages.pinned_page)

    def _insist_open(self) -> None:
        if not self._open:
            raise ValueError("the pool is closed")

    def _map(self, runs: Sequence[range]) -> list[range] | None:
        return self.pages.mark_mapped(runs) if self._lease.map(runs) else None

    def _unmap(self, runs: Sequence[range]) -> list[range]:
        if any(not self.pages.is_mapped(page) for run in runs for page in run):
            raise ValueError("a page is not mapped")
        gone: list[range] = []
        try:
            self._lease.unmap(runs)
        finally:
            unmapped = [range(p, p + 1) for run in runs for p in run if not self.vmm.is_mapped(p)]
            gone = self.pages.mark_unmapped(unmapped)
        return gone
