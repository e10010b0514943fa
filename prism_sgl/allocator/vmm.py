"""What a memory backend does: reserve an address range once, then map and unmap pages in it.

Addresses outlive the memory behind them, which is what lets tensors and captured graphs stay valid while
pages come and go. There are two backends: ``vmm_host.py`` (memfd and mmap) and ``vmm_cuda.py`` (the CUDA driver).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NewType, Protocol

import numpy as np

from prism_sgl.errors import VmmError
from prism_sgl.units import GRANULE_BYTES

__all__ = ["GRANULE_BYTES", "DeviceFullError", "PageId", "Vmm", "address_of", "merge_runs", "num_pages_in"]

PageId = NewType("PageId", int)


class DeviceFullError(VmmError):
    """The device has no memory for these pages: a shortage, though the ledger had room for them."""


class Vmm(Protocol):
    """One arena: a reserved virtual range of ``num_pages`` pages, each mapped or not.

    A run is a ``range`` of page numbers. An unmapped page faults when touched; it never aliases other memory.
    A page may also be *stuck*: it is not usable, but a failed call has left its memory held. Stuck pages count
    as held until a later call on the arena frees them, so that the books stay true whatever fails.
    """

    @property
    def base(self) -> int:
        """Address of page 0."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def mapped_bytes(self) -> int:
        """Bytes that may be touched."""

    @property
    def held_bytes(self) -> int:
        """``mapped_bytes`` and what stuck pages hold: what a lease must cover."""

    def is_mapped(self, page: int) -> bool: ...

    def physical_bytes(self) -> int:
        """What the device says that this arena holds. Asks the device: for checks, not for the fast path."""

    def map(self, runs: Sequence[range]) -> None:
        """Back these unmapped pages with memory. All or nothing.

        Raises:
            DeviceFullError: the device is full. No page of ``runs`` is mapped.
            VmmError: another failure. No page of ``runs`` is mapped.
        """

    def unmap(self, runs: Sequence[range]) -> None:
        """Give the memory of these mapped pages back to the device.

        Raises:
            VmmError: a call failed. Runs are done in order; ``is_mapped`` and ``held_bytes`` say how far it came.
        """

    def copy_in(self, offset: int, source: memoryview) -> None:
        """Begin to copy host bytes to ``base + offset``, onto mapped pages; ``settle`` waits for the end.

        Copies end in the order in which they began; until ``settle``, they must begin in ascending order too.

        Raises:
            VmmError: a call failed. A part of the bytes may have come.
        """

    def copy_out(self, offset: int, target: memoryview) -> None:
        """Copy from mapped pages to host bytes, after every copy in; done when it returns. Raises like ``settle``."""

    def settle(self) -> None:
        """Wait until every copy in is done.

        Raises:
            VmmError: one failed.
        """

    def is_settled(self) -> bool:
        """No copy in is under way. Never waits. Raises like ``settle``."""

    def hold_back(self, stream: int, end: int) -> None:
        """Later work on this stream of the device waits until bytes ``[0, end)`` are there; the caller does not.

        Raises:
            VmmError: the driver failed; nothing is held back.
        """

    def close(self) -> None:
        """Give everything back, the address range too."""

    def check(self) -> None: ...


def merge_runs(runs: Iterable[range]) -> list[range]:
    """The same pages, ascending, neighbours joined: one driver call a run instead of one a page.

    Raises:
        ValueError: a page occurs twice.
    """
    merged: list[range] = []
    for run in sorted((r for r in runs if len(r)), key=lambda r: r.start):
        if run.step != 1:
            raise ValueError(f"{run} is not a run of neighbours")
        if merged and run.start < merged[-1].stop:
            raise ValueError(f"page {run.start} occurs twice")
        if merged and run.start == merged[-1].stop:
            merged[-1] = range(merged[-1].start, run.stop)
        else:
            merged.append(run)
    return merged


def address_of(view: memoryview) -> int:
    """Where its bytes lie. They must be contiguous; read-only ones have an address too."""
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def num_pages_in(runs: Iterable[range]) -> int:
    return sum(len(run) for run in runs)
