"""A model's weights on the device: all storages in one arena, which sleeps and wakes page by page.

Giving pages back copies nothing, because the image holds the same bytes already; wake maps at the same addresses
what is missing and copies it in from the image, so that parameters and captured graphs stay valid. The last pages go
first: they are needed last, so a forward pass can begin while they still arrive. Buffers that change at run time
do not belong here: they would come back as they were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_sgl.allocator.image import Image
from prism_sgl.allocator.lease import Lease
from prism_sgl.allocator.ledger import Kind, Owner
from prism_sgl.allocator.vmm import Vmm, num_pages_in
from prism_sgl.errors import VmmError

__all__ = ["Image", "Layout", "WeightsArena"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each storage begins in the arena."""

    offsets: tuple[int, ...]
    total_bytes: int

    @classmethod
    def plan(cls, sizes_bytes: Sequence[int], align: int = 256) -> Layout:
        """One after the other, each aligned; kernels load 16 bytes at a time and allocators give 256."""
        offsets = []
        end = 0
        for size_bytes in sizes_bytes:
            if size_bytes < 0:
                raise ValueError(f"a storage of {size_bytes} bytes")
            start = -(-end // align) * align
            offsets.append(start)
            end = start + size_bytes
        return cls(tuple(offsets), -(-end // align) * align)


class WeightsArena:
    """Invariant: the lease covers what the arena holds; pages that are mapped hold the model's bytes, or will once
    ``vmm`` has settled (while loading, the caller fills them), except those that ``_hollow`` names.
    """

    def __init__(self, vmm: Vmm, owner: Owner, image: Image | None = None) -> None:
        self.vmm = vmm
        self._lease = Lease(vmm, owner, Kind.WEIGHTS)
        self._image: Image | None = None
        # Mapped without the model's bytes: a wake could neither copy to them nor unmap them.
        self._hollow: set[int] = set()
        if image is not None:
            self.adopt(image)

    @property
    def mapped(self) -> bool:
        """All of it is there, or on its way."""
        return self.missing_bytes == 0

    @property
    def missing_bytes(self) -> int:
        """What a wake has to copy."""
        there = self.vmm.mapped_bytes - len(self._hollow) * self.vmm.page_bytes
        return self.vmm.size_bytes - there

    def unmapped_bytes(self, end_bytes: int) -> int:
        """What ``materialise`` of the first ``end_bytes`` would take from the budget: whole pages."""
        return num_pages_in(self._missing(self._end_page(end_bytes))) * self.vmm.page_bytes

    @property
    def image(self) -> Image | None:
        return self._image

    @property
    def leased_granules(self) -> int:
        return self._lease.granules

    @property
    def device_shortages(self) -> int:
        """So often the device had no memory for what the ledger had granted: somebody outside the ledger holds it."""
        return self._lease.device_shortages

    def materialise(self, end_bytes: int) -> bool:
        """Map the pages of bytes ``[0, end_bytes)``, to be filled by the caller.

        False on shortage, with nothing changed.
        """
        return self._map(self._missing(self._end_page(end_bytes)))

    def adopt(self, image: Image) -> None:
        """From now on these are the bytes that a wake brings back.

        Raises:
            VmmError: it is of another size, or could still be changed by somebody.
        """
        if image.size_bytes != self.vmm.size_bytes:
            raise VmmError(f"the image has {image.size_bytes} bytes, the arena {self.vmm.size_bytes}")
        if not image.is_sealed:
            raise VmmError("the image is not sealed")
        self._image = image

    def give_back(self, num_pages: int) -> int:
        """Unmap up to so many pages, the last ones first; returns how many. Nothing may be using the weights.

        Raises:
            ValueError: there is no image to wake from. Nothing has changed.
            VmmError: the driver failed; call again.
        """
        if self._image is None:
            raise ValueError("without an image the weights would be lost")
        mapped = [page for page in range(self.vmm.num_pages) if self.vmm.is_mapped(page)]
        given = mapped[max(0, len(mapped) - num_pages) :]
        self._unmap(_runs(given))
        return len(given)

    def sleep(self) -> None:
        """Give everything back; raises like ``give_back``."""
        self.give_back(self.vmm.num_pages)

    def wake(self) -> bool:
        """Reserve and map what is missing, and begin to copy it in; ``vmm.settle`` waits until it is there.

        All is mapped first, an 8B in 12 ms: beside a copy each page takes 1.2 ms instead of 0.1, and the copy is no
        sooner done for that (H200, 2026-11-29). False on shortage, with nothing changed.

        Raises:
            VmmError: the driver failed. What this call had mapped has been given back.
        """
        image = self._image
        if image is None:
            raise ValueError("there is no image to wake from")
        missing = self._missing(self.vmm.num_pages)
        if not self._map(missing):
            return False
        self._hollow.update(page for run in missing for page in run)
        try:
            view = image.readonly_view()
            for run in _runs(sorted(self._hollow)):
                start, end = run.start * self.vmm.page_bytes, run.stop * self.vmm.page_bytes
                self.vmm.copy_in(start, view[start:end])
        except BaseException:
            self._unmap(missing)
            raise
        self._hollow.clear()
        return True

    def check(self) -> None:
        self.vmm.check()
        self._lease.check()
        assert all(self.vmm.is_mapped(page) for page in self._hollow)
        if self._image is not None:
            self._image.check()

    def _end_page(self, end_bytes: int) -> int:
        return -(-end_bytes // self.vmm.page_bytes)

    def _missing(self, end: int) -> list[range]:
        return _runs([page for page in range(end) if not self.vmm.is_mapped(page)])

    def _unmap(self, runs: Sequence[range]) -> None:
        try:
            self._lease.unmap(runs)
        finally:
            self._hollow = {page for page in self._hollow if self.vmm.is_mapped(page)}

    def _map(self, runs: Sequence[range]) -> bool:
        return not runs or (self._lease.reserve(num_pages_in(runs)) and self._lease.map(runs))


def _runs(pages: Sequence[int]) -> list[range]:
    """Ascending pages as runs of neighbours."""
    runs: list[range] = []
    for page in pages:
        if runs and runs[-1].stop == page:
            runs[-1] = range(runs[-1].start, page + 1)
        else:
            runs.append(range(page, page + 1))
    return runs
