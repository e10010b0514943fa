"""The supervisor's socket to the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zmq.asyncio import Context, Socket
from zmq.constants import Flag, SocketOption, SocketType

from prism_sgl import addresses
from prism_sgl.launch.tasks import Fail, start_task
from prism_sgl.messages import (
    DECODE_ERRORS,
    RouterToSupervisor,
    SupervisorToRouter,
    decode_router_to_supervisor,
    encode,
)


class RouterLink:
    """A DEALER of identity ``supervisor``, made anew for each router: a frame for a dead one is not kept."""

    def __init__(self, run_dir: str, receive: Callable[[RouterToSupervisor], None], fail: Fail) -> None:
        self.num_undecodable = 0
        self._address = addresses.router_for_supervisor(run_dir)
        self._receive = receive
        self._fail = fail
        self._context = Context()
        self._socket: Socket | None = None
        self._reader: asyncio.Task[None] | None = None

    def connect(self) -> None:
        self._disconnect()
        self._socket = self._context.socket(SocketType.DEALER)
        self._socket.setsockopt(SocketOption.IDENTITY, b"supervisor")
        self._socket.setsockopt(SocketOption.LINGER, 0)
        self._socket.setsockopt(SocketOption.RECONNECT_IVL, 20)
        self._socket.setsockopt(SocketOption.RECONNECT_IVL_MAX, 200)
        self._socket.connect(self._address)
        self._reader = start_task(self._read(self._socket), self._fail)

    def send(self, message: SupervisorToRouter) -> None:
        # Never waits: a router that does not read for thousands of messages is dead, and the next one asks.
        if self._socket is not None:
            sent = asyncio.ensure_future(self._socket.send(encode(message), Flag.NOBLOCK))
            sent.add_done_callback(lambda done: done.cancelled() or done.exception())

    def close(self) -> None:
        self._disconnect()
        self._context.term()

    def _disconnect(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _read(self, socket: Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                message = decode_router_to_supervisor(frames[0])
            except DECODE_ERRORS:
                self.num_undecodable += 1
                continue
            self._receive(message)
