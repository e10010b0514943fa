"""A memory file mapped as a whole, and given all its memory: in huge pages where the kernel has them.

Zeroed and mapped in pieces of 4 KiB, 15 GiB take eight threads 4.2 s on a card's machine, and page-locking them 1.0 s;
in huge pages 0.75 and 0.47 s (docs/benchmarks.md). Linux gives memory files none by itself unless the administrator
asks for it (/sys/kernel/mm/transparent_hugepage/shmem_enabled), but it does when a process does (MADV_COLLAPSE, 6.1).
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from concurrent.futures import ThreadPoolExecutor

from prism_sgl.allocator.host_calls import HostCalls
from prism_sgl.allocator.vmm import address_of

HUGE_PAGE_BYTES = 2 << 20
_THREADS = 8
_PART_BYTES = 64 << 20
_SMALL_PAGE_BYTES = 4 << 10


def map_file(fd: int, size_bytes: int, *, writable: bool) -> memoryview:
    """All of the file, where its huge pages can be mapped; unmapped when no view of it or of a part is left.

    Raises:
        OSError: the kernel refuses.
    """
    calls = HostCalls()
    reserved = calls.reserve(size_bytes + HUGE_PAGE_BYTES)
    address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    try:
        calls.map(address, size_bytes, fd, 0, writable=writable)
    except OSError:
        calls.release(reserved, size_bytes + HUGE_PAGE_BYTES)
        raise
    memory = (ctypes.c_char * size_bytes).from_address(address)
    weakref.finalize(memory, calls.release, reserved, size_bytes + HUGE_PAGE_BYTES).atexit = False
    view = memoryview(memory).cast("B")
    return view if writable else view.toreadonly()


def allocate_all(fd: int, view: memoryview) -> None:
    """Memory for the whole file, zeroed and mapped now: page-locking would do both in one thread.

    Raises:
        OSError: there is not so much.
    """
    calls = HostCalls()
    address, size_bytes = address_of(view), view.nbytes
    parts = [range(at, min(at + _PART_BYTES, size_bytes)) for at in range(0, size_bytes, _PART_BYTES)]

    def collapse(part: range) -> None:
        whole = len(part) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        # The kernel makes huge what has a page, and leaves holes alone.
        for offset in range(part.start, part.start + whole, HUGE_PAGE_BYTES):
            calls.allocate(fd, offset, _SMALL_PAGE_BYTES)
        with contextlib.suppress(OSError):  # it has none left, or cannot: small ones follow
            calls.collapse(address + part.start, whole)

    def populate(part: range) -> None:
        calls.populate(address + part.start, len(part))

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(collapse, parts):
            pass
        # A hole filled later, when memory has run out, would be a SIGBUS.
        calls.allocate(fd, 0, size_bytes)
        for _ in threads.map(populate, parts):
            pass
