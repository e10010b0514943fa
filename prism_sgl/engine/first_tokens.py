"""How many requests have had their first token, told by the scheduler process to its worker.

The router keeps a device's prefill queue short, so it must know when a prefill is over. A streamed answer shows it
by its first chunk; an answer in one piece shows nothing until its end, and would hold a place in the prefill window
for its whole life. The count is cumulative: a datagram that is lost is made good by the next.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

_COUNT = struct.Struct("<Q")


class FirstTokenTeller:
    """The scheduler's end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._total = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def add(self, requests: int) -> None:
        self._total += requests
        # Nobody there yet, or a full queue: the next one carries this too.
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            self._socket.sendto(_COUNT.pack(self._total), self._path)


class FirstTokenListener:
    """The worker's end: a descriptor to poll, and the newest count."""

    def __init__(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(path)

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> int | None:
        """The newest count, None if there is none new."""
        newest = None
        with contextlib.suppress(BlockingIOError):
            while True:
                (newest,) = _COUNT.unpack(self._socket.recv(_COUNT.size))
        return newest

    def close(self) -> None:
        self._socket.close()
