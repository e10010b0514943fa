"""How an owner is told to look at its slot: one datagram on a Unix socket, which its idle loop polls.

A bell carries no meaning but "look": lost rings and extra rings do no harm, the truth stands in the ledger.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket

from prism_sgl.errors import LedgerError

_MAX_RINGS = 256  # drained at once: a neighbour that rings without end must not hold us here


class Doorbell:
    """A bell of this process, at ``path`` (removed when it closes)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            os.fchmod(self._socket.fileno(), 0o600)  # before bind, so that the file is never open to others
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # of a dead process that had our id
            self._socket.bind(path)
        except OSError as error:
            self._socket.close()
            raise LedgerError(f"no doorbell at {path}: {error}; choose another run_dir") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> bool:
        """Take all rings; True if there was one."""
        for count in range(_MAX_RINGS):
            try:
                self._socket.recv(1)
            except BlockingIOError:
                return count > 0
        return True

    def wait(self, timeout_s: float) -> bool:
        """Sleep until somebody rings, or so long; True if somebody rang."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)
        return self.drain()

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._socket.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def ring(path: str) -> None:
    """Ring the bell at ``path``. Nobody there, a full queue (it has rung already), no descriptor left: nothing to do.

    Never an error: who rings is in the middle of its books.
    """
    if not path:
        return
    with (
        contextlib.suppress(OSError),
        socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        ) as sender,
    ):
        sender.sendto(b"!", path)
