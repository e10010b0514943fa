"""The system calls of the host backend, one method each, so that tests can make each of them fail."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_HIDDEN = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_PROT_NONE = 0
_MADV_POPULATE_WRITE = 23  # kernel 5.14
_MADV_COLLAPSE = 25  # kernel 6.1
_FAILED = ctypes.c_void_p(-1).value


class HostCalls:
    """Every method raises OSError with the errno of its call."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap = libc.mmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
        ]  # fmt: skip
        self._munmap = libc.munmap
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._mprotect = libc.mprotect
        self._mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._madvise = libc.madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._fallocate = libc.fallocate
        self._fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

    def reserve(self, size_bytes: int) -> int:
        """An address range in which every access faults."""
        return self._call_mmap(None, size_bytes, _PROT_NONE, _HIDDEN, -1, 0)

    def memory_file(self, name: str, size_bytes: int) -> int:
        """A memfd of this size that holds no memory yet."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size_bytes)
        except OSError:
            os.close(fd)
            raise
        return fd

    def allocate(self, fd: int, offset: int, size_bytes: int) -> None:
        """Memory for this part of the file, now: a hole filled at first touch would be a SIGBUS when it fails."""
        os.posix_fallocate(fd, offset, size_bytes)

    def map(self, address: int, size_bytes: int, fd: int, offset: int, *, writable: bool = True) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._call_mmap(address, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)

    def hide(self, address: int, size_bytes: int) -> None:
        """Reserve over what is mapped there: the range stays ours, an access faults."""
        self._call_mmap(address, size_bytes, _PROT_NONE, _HIDDEN | _MAP_FIXED, -1, 0)

    def punch(self, fd: int, offset: int, size_bytes: int) -> None:
        """Give this part's memory back to the system; it reads as zero when it is allocated again."""
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if self._fallocate(fd, mode, offset, size_bytes) != 0:
            raise _error("fallocate")

    def populate(self, address: int, size_bytes: int) -> None:
        """Fault a writable mapping in. A kernel before 5.14 does nothing: each page then is faulted in when touched."""
        if (
            self._madvise(address, size_bytes, _MADV_POPULATE_WRITE) != 0
            and ctypes.get_errno() != errno.EINVAL
        ):
            raise _error("madvise")

    def collapse(self, address: int, size_bytes: int) -> None:
        """Have a memory file's huge pages in the place of small ones; kernel 6.1. Address and file aligned to them."""
        if size_bytes and self._madvise(address, size_bytes, _MADV_COLLAPSE) != 0:
            raise _error("madvise")

    def protect(self, address: int, size_bytes: int) -> None:
        """From now on a write there faults."""
        if self._mprotect(address, size_bytes, mmap.PROT_READ) != 0:
            raise _error("mprotect")

    def release(self, address: int, size_bytes: int) -> None:
        if self._munmap(address, size_bytes) != 0:
            raise _error("munmap")

    def _call_mmap(
        self, address: int | None, size_bytes: int, protection: int, flags: int, fd: int, offset: int
    ) -> int:
        result: int | None = self._mmap(address, size_bytes, protection, flags, fd, offset)
        if result is None or result == _FAILED:
            raise _error("mmap")
        return result


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
