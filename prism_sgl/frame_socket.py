"""ZeroMQ sockets on an asyncio loop, without zmq.asyncio: that costs two futures and a poller round a frame.

The one reader of frames of router, api_servers and workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

_READ_BATCH = 256
_LINGER_MS = 200
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)


class FrameSocket:
    """One socket: frames in by callback, frames out at once.

    No high-water marks: they would drop or block. What is under way is bounded by grants and credit.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        on_frames: Callable[[list[bytes]], None],
        *,
        identity: bytes | None = None,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        self._on_frames = on_frames
        self._on_read = on_read  # called after each batch of frames
        self._loop = asyncio.get_running_loop()
        self._is_reading = False
        self._is_scheduled = False
        self._socket = context.socket(kind)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        if kind == zmq.ROUTER:
            # Otherwise a frame for a peer that is gone is dropped in silence, and a peer that starts again
            # is locked out until its old connection has timed out.
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if identity is not None:
            self._socket.setsockopt(zmq.IDENTITY, identity)
        self._fd = int(self._socket.getsockopt(zmq.FD))

    def bind(self, address: str) -> None:
        self._socket.bind(address)
        self._begin()

    def connect(self, address: str) -> None:
        self._socket.connect(address)
        self._begin()

    def _begin(self) -> None:
        self._loop.add_reader(self._fd, self._read)
        self._schedule()

    def send(self, frames: Sequence[bytes]) -> bool:
        """False: there is no such peer (only a ROUTER knows)."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        # A send may have used up the descriptor's signal of a frame that came meanwhile.
        if not self._is_reading and self._has_frames():
            self._schedule()
        return True

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close()

    def _has_frames(self) -> bool:
        return bool(int(self._socket.getsockopt(_EVENTS)) & _POLLIN)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        # The descriptor tells of changes only, so read until nothing is left; but let others have a turn.
        self._is_scheduled = False
        if self._is_reading:
            return
        self._is_reading = True
        num_frames = 0
        try:
            # To ask costs a third of the exception that an empty socket raises.
            while not self._socket.closed and self._has_frames():
                if num_frames == _READ_BATCH:
                    self._schedule()
                    break
                num_frames += 1
                self._on_frames(self._socket.recv_multipart(zmq.NOBLOCK))
        finally:
            self._is_reading = False
        if num_frames and self._on_read is not None:
            self._on_read()
