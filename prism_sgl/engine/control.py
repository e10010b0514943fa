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


class SchedulerCallError(PrismError):
    """The scheduler refused; the message is its exception's text."""


class SchedulerControl:
    """Calls ``prism_*`` methods of the scheduler (seams.RPC_METHODS) between its batches."""

    def __init__(self, rpc_ipc_name: str) -> None:
        self._context = zmq.Context(1)
        self._socket: Any = get_zmq_socket(self._context, zmq.DEALER, rpc_ipc_name, True)
        self._one_at_a_time = asyncio.Lock()

    async def sleep(self, *, keep_weights: bool, preempt: bool) -> float:
        """Seconds it took. Raises SchedulerCallError when requests are in the engine that may not be set aside."""
        began = time.perf_counter()
        while True:
            try:
                await self._call("prism_sleep", keep_weights=keep_weights, preempt=preempt)
            except SchedulerCallError as refusal:
                if time.perf_counter() - began > _BUSY_TIMEOUT_S or "in the engine" not in str(refusal):
                    raise
                await asyncio.sleep(_BUSY_RETRY_S)
            else:
                return time.perf_counter() - began

    async def wake(self, timeout_s: float) -> float:
        """Seconds it took. Raises SchedulerCallError, its text beginning with "shortage" if memory was short."""
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
            raise SchedulerCallError(reply.message)

    def _exchange(self, method: str, parameters: dict[str, float]) -> RpcReqOutput:
        sock_send(self._socket, RpcReqInput(method=method, parameters=parameters))
        reply = sock_recv(self._socket)
        assert isinstance(reply, RpcReqOutput)
        return reply
