"""File locks of the ledger: they vanish with the process that holds them, however it dies.

Open-file-description locks, not POSIX ones, because closing any descriptor of the file drops a process's POSIX
locks. They belong to the open file, so three things follow, and all are dealt with here:
threads share them (so there is a thread lock beside), a forked child shares them (so a child closes and opens
anew), and a memory map keeps its open file alive (so the ledger maps the file through an open of its own:
else a forked child's map would keep a dead parent's lock).
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType

from prism_sgl.errors import LedgerError

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid (0 for these locks)
_UNLOCKED = fcntl.F_UNLCK
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class _OpenFile:
    """One open of a file, closed in a forked child. Used again there, it opens the file anew."""

    _all: weakref.WeakSet[_OpenFile] | None = None  # None: the fork hook is not registered yet

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, _FLAGS)
        self._pid = os.getpid()
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)
        if _OpenFile._all is None:
            _OpenFile._all = weakref.WeakSet()
            os.register_at_fork(after_in_child=_OpenFile._close_all_in_child)
        _OpenFile._all.add(self)

    @property
    def fd(self) -> int:
        if self._pid != os.getpid():
            self._open_again()
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @staticmethod
    def _close_all_in_child() -> None:
        for file in _OpenFile._all or ():
            file.close()
            file.forked()

    def forked(self) -> None:
        """We are the child of a fork."""

    def _open_again(self) -> None:
        self.close()  # a fork that ran no hooks has left the parent's descriptor
        self._fd = os.open(self.path, _FLAGS)
        self._pid = os.getpid()
        status = os.fstat(self._fd)
        if (status.st_dev, status.st_ino) != self._identity:
            self.close()
            raise LedgerError(f"{self.path} was replaced after a fork; open the ledger again")


class FileLock(_OpenFile):
    """``with`` it: excludes the threads of this process and all other processes. Not reentrant."""

    def __init__(self, path: str, byte: int) -> None:
        super().__init__(path)
        self._threads = threading.Lock()
        self._lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        self._unlock = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0)

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._threads = (
                threading.Lock()
            )  # a thread that the fork did not bring along may hold the old one
        self._threads.acquire()
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLKW, self._lock)
        except BaseException:
            self._threads.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._unlock)
        finally:
            self._threads.release()

    def forked(self) -> None:
        self._threads = threading.Lock()


class LifeLocks:
    """One byte an owner. ``is_held`` asks the kernel, so it is immune to the reuse of process ids."""

    def __init__(self, lock: FileLock, first_byte: int, num_slots: int) -> None:
        self._lock = lock
        bytes_of_slots = range(first_byte, first_byte + num_slots)
        self._questions = [_FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0) for byte in bytes_of_slots]

    def is_held(self, slot: int) -> bool:
        return slot in self.held_of([slot])

    def held_of(self, slots: Sequence[int]) -> set[int]:
        """Those whose owners are alive. One system call each: the kernel names one holder at a time."""
        ask, fd, questions = fcntl.fcntl, self._lock.fd, self._questions
        # The first byte of the answer is l_type, whose values are below 256.
        return {slot for slot in slots if ask(fd, fcntl.F_OFD_GETLK, questions[slot])[0] != _UNLOCKED}


class Life(_OpenFile):
    """Holds one owner's byte until it is closed or the process ends. A forked child does not inherit it."""

    def __init__(self, path: str, byte: int) -> None:
        super().__init__(path)
        self._byte = byte

    def begin(self) -> bool:
        """False: somebody else holds the byte."""
        try:
            fcntl.fcntl(
                self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, self._byte, 1, 0)
            )
        except (BlockingIOError, PermissionError):
            return False
        return True

    @property
    def is_ours(self) -> bool:
        return self._fd >= 0 and self._pid == os.getpid()
