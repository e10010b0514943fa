"""The host's system calls, of which one may fail: the n-th from now, or every one of a kind."""

from __future__ import annotations

import errno
import os

from prism_sgl.allocator.host_calls import HostCalls

NAMES = ("memory_file", "reserve", "allocate", "map", "hide", "punch", "release")


class FailingCalls(HostCalls):
    """``fail_after``: so many calls succeed, then one fails. ``broken``: these names always fail."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_after: int | None = None
        self.broken: set[str] = set()
        self.errno = errno.ENOMEM
        self.made: list[str] = []
        self._ranges: dict[int, int] = {}  # address -> size

    def repair(self) -> None:
        self.fail_after = None
        self.broken.clear()

    def insist_empty(self) -> None:
        """All addresses have been given back. (Memory files are descriptors, which the tests count.)"""
        assert not self._ranges, "addresses leaked"

    def _call(self, name: str) -> None:
        self.made.append(name)
        fails = name in self.broken
        if self.fail_after is not None:
            fails = fails or self.fail_after == 0
            self.fail_after = None if self.fail_after == 0 else self.fail_after - 1
        if fails:
            raise OSError(self.errno, os.strerror(self.errno))

    def memory_file(self, name: str, size_bytes: int) -> int:
        self._call("memory_file")
        return super().memory_file(name, size_bytes)

    def reserve(self, size_bytes: int) -> int:
        self._call("reserve")
        address = super().reserve(size_bytes)
        self._ranges[address] = size_bytes
        return address

    def allocate(self, fd: int, offset: int, size_bytes: int) -> None:
        self._call("allocate")
        super().allocate(fd, offset, size_bytes)

    def map(self, address: int, size_bytes: int, fd: int, offset: int, *, writable: bool = True) -> None:
        self._call("map")
        super().map(address, size_bytes, fd, offset, writable=writable)

    def hide(self, address: int, size_bytes: int) -> None:
        self._call("hide")
        super().hide(address, size_bytes)

    def punch(self, fd: int, offset: int, size_bytes: int) -> None:
        self._call("punch")
        super().punch(fd, offset, size_bytes)

    def release(self, address: int, size_bytes: int) -> None:
        self._call("release")
        super().release(address, size_bytes)
        assert self._ranges.pop(address) == size_bytes
