"""The supervisor's side of one standby: the process that forks workers, or keeps some waiting (engine/standby.py).

One for each device. Its death is the death of all its runtimes: what is left of their sessions is ended,
each is reported, and a new standby starts.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from prism_sgl.config import DeviceConfig
from prism_sgl.launch.children import Child, start_child
from prism_sgl.messages import (
    DECODE_ERRORS,
    Kill,
    RuntimeId,
    RuntimeSpec,
    Spawn,
    StandbyToSupervisor,
    SupervisorToStandby,
    decode_standby_to_supervisor,
    encode_json,
)

_MAX_MESSAGE_BYTES = 1 << 18


class StandbyLink:
    """The socket pair to the standby of one device. Messages wait here while no standby lives."""

    def __init__(
        self,
        device: DeviceConfig,
        start_parallel: int,
        receive: Callable[[DeviceConfig, StandbyToSupervisor], None],
    ) -> None:
        self.device = device
        # As many as may start at once; on the host they are forked when they are wanted.
        self._num_waiting = start_parallel if device.kind == "cuda" else 0
        self.num_undecodable = 0
        self._receive = receive
        self._socket: socket.socket | None = None
        self._unsent: deque[bytes] = deque()

    def start(self, module: str, *, env: Mapping[str, str], log: Path) -> Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            args = [
                "--fd",
                str(theirs.fileno()),
                "--kind",
                self.device.kind,
                "--index",
                str(self.device.index),
                "--waiting",
                str(self._num_waiting),
            ]
            name = f"standby {self.device.name}"
            child = start_child(name, module, args, env=env, log=log, fds=[theirs.fileno()])
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours, self._read)
        self._flush()
        return child

    def spawn(self, spec: RuntimeSpec) -> None:
        self._send(Spawn(spec=spec))

    def kill(self, runtime: RuntimeId, grace_s: float) -> None:
        self._send(Kill(runtime=runtime, grace_s=grace_s))

    def close(self) -> None:
        """The standby has ended, or shall: it sees the end of the stream. What it said last still counts."""
        while self._read():
            pass
        self._unsent.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            asyncio.get_running_loop().remove_writer(self._socket)
            self._socket.close()
            self._socket = None

    def _send(self, message: SupervisorToStandby) -> None:
        self._unsent.append(encode_json(message))
        self._flush()

    def _flush(self) -> None:
        if self._socket is None:
            return
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                self._socket.send(self._unsent[0])
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except OSError:  # it has ended; its exit is reported by the process, not by the socket
                return
            self._unsent.popleft()
        loop.remove_writer(self._socket)

    def _read(self) -> bool:
        """Take one message; False: there is none, now or any more."""
        if self._socket is None:
            return False
        try:
            frame = self._socket.recv(_MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            frame = b""
        if not frame:
            asyncio.get_running_loop().remove_reader(self._socket)
            return False
        try:
            message = decode_standby_to_supervisor(frame)
        except DECODE_ERRORS:
            self.num_undecodable += 1
        else:
            self._receive(self.device, message)
        return True


def private_environment(run_dir: Path) -> dict[str, str]:
    """What our children see: our own environment, but temporary files where nobody else can write."""
    return {**os.environ, "TMPDIR": str(run_dir / "tmp"), "PYTHONUNBUFFERED": "1"}
