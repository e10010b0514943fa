"""The image: a model's device bytes in host memory, from which every wake copies.

Its file is a sealed memfd: once it is filled, nobody can map it for writing, write to it or change its size. The one
who made it keeps the mapping that he filled, because page-locking another would take a second for 16 GiB, but only
for reading. So runtimes of one model share it, and need trust nobody but the one who brought the bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from prism_sgl import memfd
from prism_sgl.allocator.file_memory import allocate_all, map_file
from prism_sgl.allocator.host_calls import HostCalls
from prism_sgl.allocator.vmm import address_of
from prism_sgl.errors import VmmError

_MAX_NAME_BYTES = 200

PageLock = Callable[[memoryview], Callable[[], None]]
"""Fixes host bytes in place for the device; returns what undoes it. Raises VmmError."""


class Image:
    """One memfd of ``size_bytes``. Writable until it is sealed, then the same for ever."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self.size_bytes = size_bytes
        self._view: memoryview | None = None
        self._unlock: Callable[[], None] | None = None

    @classmethod
    def create(cls, name: str, size_bytes: int, page_lock: PageLock | None = None) -> Image:
        """A new image with all its memory: a hole filled later, when memory has run out, would be a SIGBUS.

        Raises:
            VmmError: the host has no memory for it, or cannot page-lock it.
        """
        file_name = f"prism-image:{name}".encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
        image = cls(os.memfd_create(file_name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), 0)
        image.resize(size_bytes, page_lock)
        return image

    @classmethod
    def from_fd(cls, fd: int, size_bytes: int) -> Image:
        """An image that another process made; this object owns ``fd`` from now on.

        Raises:
            VmmError: it is not of this size. ``fd`` is closed.
        """
        actual = os.fstat(fd).st_size
        if actual != size_bytes:
            os.close(fd)
            raise VmmError(f"the image has {actual} bytes, not {size_bytes}")
        return cls(fd, size_bytes)

    def resize(self, size_bytes: int, page_lock: PageLock | None = None) -> None:
        """Cut it off or extend it, with all its memory. Only by its maker, before it is sealed.

        Raises:
            VmmError: the host has no memory for it, or cannot page-lock it. The image is closed.
        """
        if size_bytes == self.size_bytes:
            return
        try:
            self._unmap()
            os.ftruncate(self._fd, size_bytes)
            self._view = map_file(self._fd, size_bytes, writable=True)
            allocate_all(self._fd, self._view)
        except OSError as error:
            self.close()
            raise VmmError(f"no host memory for an image of {size_bytes} bytes: {error.strerror}") from error
        self.size_bytes = size_bytes
        if page_lock is not None:
            try:
                self.page_lock(page_lock)
            except VmmError:
                self.close()
                raise

    def fileno(self) -> int:
        return self._fd

    @contextlib.contextmanager
    def writable_view(self) -> Iterator[memoryview]:
        """The image's bytes, to be written by its maker, before it is sealed.

        No slice of the view may be written to after the ``with``: once sealed, that is a SIGSEGV.
        """
        if self._view is None or self.is_sealed:
            raise ValueError("only its maker writes an image, and only before it is sealed")
        with memoryview(self._view) as view:
            yield view

    def readonly_view(self) -> memoryview:
        """The sealed image's bytes, mapped once and kept: mapping again at every wake would fault every page again."""
        if not self.is_sealed:
            raise ValueError("the image is not sealed: its bytes may still change")
        if self._view is None:
            # Page-locking a private map would copy all of it (measured: 8 GiB in 7.6 s, and 8 GiB more held).
            self._view = map_file(self._fd, self.size_bytes, writable=False)
        return self._view

    @property
    def is_page_locked(self) -> bool:
        return self._unlock is not None

    def page_lock(self, page_lock: PageLock) -> None:
        """Once, of a sealed image or of its maker's; kept until ``close``, so that is to come before the device's end.

        Raises:
            VmmError: the system refuses. Copies from it work, but slowly.
        """
        if self._unlock is None:
            self._unlock = page_lock(self.readonly_view() if self._view is None else self._view)

    def seal(self) -> None:
        """Nobody can write it any more, or change its size.

        Raises:
            VmmError: the kernel cannot seal it.
        """
        if self.is_sealed:
            return
        try:
            if self._view is not None:
                HostCalls().protect(address_of(self._view), self.size_bytes)
                self._view = self._view.toreadonly()
            memfd.seal(self._fd)
        except OSError as error:
            raise VmmError(f"the image cannot be sealed: {error.strerror}; Linux 5.1 or later can") from error

    @property
    def is_sealed(self) -> bool:
        return memfd.is_sealed(self._fd)

    def close(self) -> None:
        self._unmap()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def check(self) -> None:
        assert self._view is not None or self._unlock is None
        if self._fd >= 0:
            assert os.fstat(self._fd).st_size == self.size_bytes

    def _unmap(self) -> None:
        if self._unlock is not None:
            self._unlock()
            self._unlock = None
        if self._view is not None:
            self._view.release()
            self._view = None
