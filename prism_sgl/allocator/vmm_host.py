"""The host backend: an arena is a reserved address range and one sparse memfd, page i at offset i * page_bytes.

A page is mapped by allocating its part of the file and mapping it with MAP_FIXED; it is unmapped by hiding the
range and punching the hole. Both steps matter: hiding alone keeps the memory (RSS falls, ``st_blocks`` of the
memfd does not), punching alone leaves addresses that silently fill with memory again when touched.
One file for all pages lets neighbouring pages share one kernel mapping (vm.max_map_count is 65530).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from prism_sgl.allocator.arena import MAPPED, STUCK, UNMAPPED, ArenaPages
from prism_sgl.allocator.host_calls import HostCalls
from prism_sgl.allocator.vmm import DeviceFullError
from prism_sgl.errors import VmmError

_MAX_NAME_BYTES = 240  # memfd_create takes 249
_SHORTAGE = frozenset({errno.ENOSPC, errno.ENOMEM})
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system


class HostArena(ArenaPages):
    """A ``Vmm`` on host memory.

    Invariants: a mapped page has all its memory; an unmapped page has none and faults; a stuck page (a call
    failed half-way) is not to be touched and may hold memory until ``_free_stuck`` succeeds.
    """

    def __init__(self, name: str, num_pages: int, page_bytes: int, calls: HostCalls | None = None) -> None:
        super().__init__(name, num_pages, page_bytes, unit_bytes=os.sysconf("SC_PAGE_SIZE"))
        self._calls = HostCalls() if calls is None else calls
        file_name = f"prism:{name}".encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
        try:
            self._fd = self._calls.memory_file(file_name, self.size_bytes)
        except OSError as error:
            raise VmmError(f"{name}: no memory file: {error}") from error
        try:
            self.base = self._calls.reserve(self.size_bytes)
        except OSError as error:
            os.close(self._fd)
            raise VmmError(f"{name}: cannot reserve {self.size_bytes} bytes of addresses: {error}") from error

    def physical_bytes(self) -> int:
        return os.fstat(self._fd).st_blocks * _BLOCK_BYTES if self._is_open else 0

    def map(self, runs: Sequence[range]) -> None:
        merged = self._checked(runs, mapped=False)
        self._free_stuck()
        started: list[range] = []
        try:
            for run in merged:
                if any(self._states[page] == STUCK for page in run):
                    raise VmmError(f"{self.name}: pages {run} are stuck")
                started.append(run)
                offset, size_bytes = self._span_of(run)
                self._calls.allocate(self._fd, offset, size_bytes)
                self._calls.map(self.base + offset, size_bytes, self._fd, offset)
                self._mark(run, MAPPED)
        except (OSError, VmmError) as error:
            for run in started:
                self._mark(run, STUCK)
            self._free_stuck()
            if isinstance(error, VmmError):
                raise
            kind = DeviceFullError if error.errno in _SHORTAGE else VmmError
            raise kind(f"{self.name}: cannot map {merged}: {error}") from error

    def unmap(self, runs: Sequence[range]) -> None:
        merged = self._checked(runs, mapped=True)
        self._free_stuck()
        for run in merged:
            offset, size_bytes = self._span_of(run)
            try:
                self._calls.hide(self.base + offset, size_bytes)
                self._mark(run, STUCK)
                self._calls.punch(self._fd, offset, size_bytes)
            except OSError as error:
                raise VmmError(f"{self.name}: cannot unmap {run}: {error}") from error
            self._mark(run, UNMAPPED)

    def copy_in(self, offset: int, source: memoryview) -> None:
        if source.nbytes:
            self._span(offset, source.nbytes)[:] = source.cast("B")

    def copy_out(self, offset: int, target: memoryview) -> None:
        if target.nbytes:
            target.cast("B")[:] = self._span(offset, target.nbytes)

    def settle(self) -> None:
        pass  # copies are done when they return

    def is_settled(self) -> bool:
        return True

    def hold_back(self, stream: int, end: int) -> None:
        pass

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._mark(range(self.num_pages), UNMAPPED)
        os.close(self._fd)  # with the mapping gone too, the last reference to the memory
        try:
            self._calls.release(self.base, self.size_bytes)
        except OSError as error:
            raise VmmError(f"{self.name}: cannot release its addresses: {error}") from error

    def check(self) -> None:
        assert all(state in (UNMAPPED, MAPPED, STUCK) for state in self._states)
        physical = self.physical_bytes()
        # Less than mapped: a page would be filled at first touch, and SIGBUS when that fails. More than held:
        # a leak that no lease covers.
        assert self.mapped_bytes <= physical <= self.held_bytes, (
            self.mapped_bytes,
            physical,
            self.held_bytes,
        )

    def _free_stuck(self) -> None:
        """Try again to free what failed calls have left behind. Failing again changes nothing."""
        for page in range(self.num_pages) if STUCK in self._states else ():
            if self._states[page] == STUCK:
                offset, size_bytes = self._span_of(range(page, page + 1))
                try:
                    self._calls.hide(self.base + offset, size_bytes)
                    self._calls.punch(self._fd, offset, size_bytes)
                except OSError:
                    continue  # still stuck, and counted as held
                self._states[page] = UNMAPPED

    def _span(self, offset: int, size_bytes: int) -> memoryview:
        """These bytes, which must be mapped."""
        self._check_span(offset, size_bytes)
        return memoryview((ctypes.c_char * size_bytes).from_address(self.base + offset)).cast("B")
