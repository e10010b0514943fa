"""The supervisor's side of one standby: the process that forks workers, or keeps some waiting (engine/standby.py).

One for each device. Its death is the death of all its runtimes: what is left of their sessions is ended,
each is reported, and a new standby starts.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prism_sgl.config import Config, DeviceConfig
from prism_sgl.config_checks import allowed_devices
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


@dataclass(frozen=True, slots=True)
class HostShare:
    """What the waiting workers of one device may take of the host."""

    num_waiting: int
    num_expected: int  # models that start at the beginning
    num_cores: int


def share_host(config: Config, num_cores: int) -> dict[str, HostShare]:
    """By device. As many workers wait on the whole host as the router lets start at once, for each costs about 2 GiB
    of host memory; but one beside each card that a model may come to, or its start there would pay the imports."""
    named = {device.name for model in config.models.values() for device in allowed_devices(config, model)}
    cards = [device.name for device in config.devices if device.kind == "cuda" and device.name in named]
    each, rest = divmod(max(config.scheduler.start_parallel, len(cards)), max(1, len(cards)))
    cores_each = max(1, num_cores // max(1, len(cards)))
    # Which card each of them starts on is for the router to say.
    expected = math.ceil(sum(model.preload for model in config.models.values()) / max(1, len(cards)))
    # Workers of a host device are forked when they are wanted.
    shares = {device.name: HostShare(0, 0, cores_each) for device in config.devices}
    for number, card in enumerate(cards):
        shares[card] = HostShare(each + (number < rest), expected, cores_each)
    return shares


class StandbyLink:
    """The socket pair to the standby of one device. Messages wait here while no standby lives."""

    def __init__(
        self,
        device: DeviceConfig,
        share: HostShare,
        receive: Callable[[DeviceConfig, StandbyToSupervisor], None],
    ) -> None:
        self.device = device
        self._share = share
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
                str(self._share.num_waiting),
                "--expected",
                str(self._share.num_expected),
                "--cores",
                str(self._share.num_cores),
            ]
            name = f"standby {self.device.name}"
            try:
                child = start_child(name, module, args, env=env, log=log, fds=[theirs.fileno()])
            except OSError:
                ours.close()
                raise
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
