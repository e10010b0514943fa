"""A model's weights on the device: all storages in one arena, which sleeps and wakes as a whole.

Sleep unmaps and copies nothing, because the image holds the same bytes already; wake maps at the same addresses
and copies the image in, so that parameters and captured graphs stay valid. Buffers that change at run time do
not belong here: they would come back as they were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_sgl.allocator.image import Image
from prism_sgl.allocator.lease import Lease
from prism_sgl.allocator.ledger import Kind, Owner
from prism_sgl.allocator.vmm import Vmm
from prism_sgl.errors import VmmError

__all__ = ["Image", "Layout", "WeightsArena"]

# Large enough that calls cost nothing, small enough that other threads get their turn in between.
_COPY_BYTES = 64 << 20


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
    """Invariant: all pages are mapped or none is, and the lease covers what the arena holds."""

    def __init__(self, vmm: Vmm, owner: Owner, image: Image | None = None) -> None:
        self.vmm = vmm
        self._lease = Lease(vmm, owner, Kind.WEIGHTS)
        self._image: Image | None = None
        if image is not None:
            self.adopt(image)

    @property
    def mapped(self) -> bool:
        return self.vmm.mapped_bytes == self.vmm.size_bytes

    @property
    def image(self) -> Image | None:
        return self._image

    @property
    def leased_granules(self) -> int:
        return self._lease.granules

    def materialise(self) -> bool:
        """Map everything, to be filled by the caller. False on shortage, with nothing changed."""
        if self.vmm.mapped_bytes:
            raise ValueError("the weights are mapped already")
        return self._lease.reserve(self.vmm.num_pages) and self._lease.map(self._all_pages())

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

    def sleep(self) -> None:
        """Unmap everything, then return it. Nothing may be using the weights.

        Raises:
            ValueError: there is no image to wake from. Nothing has changed.
            VmmError: the driver failed; call again.
        """
        if self._image is None:
            raise ValueError("without an image the weights would be lost")
        self._lease.unmap(self._mapped_runs())

    def wake(self) -> bool:
        """Reserve, map, copy from the image. False on shortage, with nothing changed.

        Raises:
            VmmError: the driver failed. Everything has been given back.
        """
        image = self._image
        if image is None:
            raise ValueError("there is no image to wake from")
        if not self.materialise():
            return False
        try:
            view = image.readonly_view()
            for start in range(0, image.size_bytes, _COPY_BYTES):
                self.vmm.copy_in(start, view[start : start + _COPY_BYTES])
        except BaseException:
            self._lease.unmap(self._mapped_runs())
            raise
        return True

    def check(self) -> None:
        self.vmm.check()
        self._lease.check()
        assert self.vmm.mapped_bytes in (0, self.vmm.size_bytes)
        if self._image is not None:
            self._image.check()

    def _all_pages(self) -> list[range]:
        return [range(self.vmm.num_pages)]

    def _mapped_runs(self) -> list[range]:
        return [range(p, p + 1) for p in range(self.vmm.num_pages) if self.vmm.is_mapped(p)]
