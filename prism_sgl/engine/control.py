"""The worker's line to its scheduler process: SGLang's own rpc socket, one call at a time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import zmq
from sglang.srt.managers.io_struct import RpcReqInput, RpcReqOutput, sock_recv, sock_send
from sglang.srt.utils.network import get_zmq_socket

from prism_sgl.errors import PrismError

# Right after its last request a scheduler needs a turn or two before it counts as idle.
_BUSY_RETRY_S = 0.005
_BUSY_TIMEOUT_S = 1.0


# SGLang's rpc brings the text of an exception and nothing else: how those begin that have changed nothing.
BUSY, SHORTAGE = "busy: ", "shortage: "


class EngineBusyError(PrismError):
    """Requests are in the engine: it is awake as before."""


class EngineShortError(PrismError):
    """Memory did not come in time: it sleeps as before."""


class SchedulerCallError(PrismError):
    """The call failed half-way, so that nobody knows what state the scheduler is in: it must end."""


class SchedulerControl:
    """Calls ``prism_*`` methods of the scheduler (seams.RPC_METHODS) between its batches."""

    def __init__(self, rpc_ipc_name: str) -> None:
        self._context = zmq.Context(1)
        self._socket: Any = get_zmq_socket(self._context, zmq.DEALER, rpc_ipc_name, True)
        self._one_at_a_time = asyncio.Lock()

    async def sleep(self, *, keep_weights: bool, preempt: bool) -> float:
        """Seconds it took.

        Raises:
            EngineBusyError: requests are in the engine that may not be set aside.
            SchedulerCallError: the device failed.
        """
        began = time.perf_counter()
        while True:
            try:
                await self._call("prism_sleep", keep_weights=keep_weights, preempt=preempt)
            except EngineBusyError:
                if time.perf_counter() - began > _BUSY_TIMEOUT_S:
                    raise
                await asyncio.sleep(_BUSY_RETRY_S)
            else:
                return time.perf_counter() - began

    async def wake(self, timeout_s: float) -> float:
        """Seconds it took.

        Raises:
            EngineShortError: memory did not come in ``timeout_s``.
            SchedulerCallError: the device failed.
        """
        began = time.perf_counter()
        await self._call("prism_wake", timeout_s=timeout_s, wait=False)
        return time.perf_counter() - began

    async def set_quota(self, floor_bytes: int, ceiling_bytes: int) -> None:
        await self._call("prism_quota", floor_bytes=floor_bytes, ceiling_bytes=ceiling_bytes)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    async def _call(self, method: str, **parameters: float) -> None:
        async with self._one_at_a_time:
            reply = await asyncio.to_thread(self._exchange, method, parameters)
        if not reply.success:
            for beginning, error in ((BUSY, EngineBusyError), (SHORTAGE, EngineShortError)):
                if reply.message.startswith(beginning):
                    raise error(reply.message.removeprefix(beginning))
            raise SchedulerCallError(reply.message)

    def _exchange(self, method: str, parameters: dict[str, float]) -> RpcReqOutput:
        sock_send(self._socket, RpcReqInput(method=method, parameters=parameters))
        reply = sock_recv(self._socket)
        assert isinstance(reply, RpcReqOutput)
        return reply
