"""A model's weights in host memory, ready to copy: a memfd that all runtimes of the model share.

Its memory is held once, whoever maps it. Sealed, it can never change again, so runtimes need not trust each
other with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Iterator

from prism_sgl.errors import VmmError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_MAX_NAME_BYTES = 200


class Image:
    """One memfd of ``size_bytes``. Writable until it is sealed, then the same for ever."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self.size_bytes = size_bytes
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None

    @classmethod
    def create(cls, name: str, size_bytes: int) -> Image:
        """A new image with all its memory: a hole filled later, when memory has run out, would be a SIGBUS.

        Raises:
            VmmError: the host has no memory for it.
        """
        file_name = f"prism-image:{name}".encode()[:_MAX_NAME_BYTES].decode(errors="ignore")
        fd = os.memfd_create(file_name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            os.close(fd)
            raise VmmError(
                f"{name}: no host memory for an image of {size_bytes} bytes: {error.strerror}"
            ) from error
        return cls(fd, size_bytes)

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

    def resize(self, size_bytes: int) -> None:
        """Cut off or extend it, with all its memory. Only before it is sealed.

        Raises:
            VmmError: the host has no memory for it. The image is closed.
        """
        try:
            os.ftruncate(self._fd, size_bytes)
            if size_bytes > self.size_bytes:
                os.posix_fallocate(self._fd, self.size_bytes, size_bytes - self.size_bytes)
        except OSError as error:
            self.close()
            raise VmmError(f"no host memory for an image of {size_bytes} bytes: {error.strerror}") from error
        self.size_bytes = size_bytes

    def fileno(self) -> int:
        return self._fd

    @contextlib.contextmanager
    def writable_view(self) -> Iterator[memoryview]:
        """The image's bytes, to be written. Unmapped at the end: the kernel seals no memfd that can be written.

        No slice of the view may outlive the ``with``.
        """
        with mmap.mmap(self._fd, self.size_bytes) as shared, memoryview(shared) as view:
            yield view

    def readonly_view(self) -> memoryview:
        """The sealed image's bytes, mapped once and kept: mapping again at every wake would fault every page again."""
        if not self.is_sealed:
            raise ValueError("a map of an image that is not sealed would stand in the way of its seal")
        if self._view is None:
            self._map = self._map_readonly()
            self._view = memoryview(self._map)
        return self._view

    def _map_readonly(self) -> mmap.mmap:
        try:
            # Page-locking a private map would copy all of it (measured: 8 GiB in 7.6 s, and 8 GiB more held).
            return mmap.mmap(self._fd, self.size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except PermissionError:  # kernels before 6.7 allow no shared map of a sealed file
            return mmap.mmap(self._fd, self.size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)

    def seal(self) -> None:
        """Nobody can write it any more, or change its size.

        Raises:
            VmmError: it is mapped for writing somewhere.
        """
        if self.is_sealed:
            return
        try:
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise VmmError(
                f"the image cannot be sealed ({error.strerror}): it is still mapped for writing"
            ) from error

    @property
    def is_sealed(self) -> bool:
        try:
            return fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:  # no memfd: nothing can seal it
            return False

    def close(self) -> None:
        if self._view is not None and self._map is not None:
            self._view.release()
            self._map.close()
            self._view = self._map = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def check(self) -> None:
        assert (self._view is None) == (self._map is None)
        if self._fd >= 0:
            assert os.fstat(self._fd).st_size == self.size_bytes
