"""Parent of all workers of one device, so that a start does not pay SGLang's imports.

The supervisor speaks JSON with it over a SOCK_SEQPACKET pair: Spawn and Kill in, StandbyReady, Spawned and
WorkerExited out. Each worker is the leader of a session of its own; when it ends, the rest of its session is
killed, and WorkerExited is sent only when the last process is gone: orphans become our children (subreaper),
so there is none that we do not see. One thread, no event loop: what forks must have neither.

Where workers come from is a WorkerSource: forked after our own imports (host), or waiting in processes of their
own (cuda, where our process stays light).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping

from prism_sgl import messages
from prism_sgl.config_cards import BUS_ORDER, ORDER, VISIBLE, card_id
from prism_sgl.engine import spec as spec_channel
from prism_sgl.engine.processes import adopt_orphans, kill_session
from prism_sgl.engine.waiting_room import WaitingRoom
from prism_sgl.engine.worker_source import WorkerSource
from prism_sgl.messages import Kill, RuntimeId, Spawn, Spawned, StandbyToSupervisor, WorkerExited

_MESSAGE_BYTES = 1 << 20
_LOOK_AGAIN_S = 0.01
_END_WITHIN_S = 2.0  # less than the supervisor waits for us


class Standby:
    """Owns the table of living workers."""

    def __init__(self, channel: socket.socket, source: WorkerSource) -> None:
        self.channel = channel
        self.source = source
        self.workers: dict[int, RuntimeId] = {}  # leaders that live
        # leaders that ended, their session not yet: exit code
        self.ending: dict[int, tuple[RuntimeId, int]] = {}
        self.deadlines: dict[int, float] = {}  # SIGKILL to the session at this time
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def run(self) -> None:
        """Until the supervisor closes its end; then every process of ours is killed."""
        try:
            readable: list[int] = []
            while True:
                for message in self.source.step(readable):
                    if isinstance(message, Spawned):
                        self.workers[message.pid] = message.runtime
                    self._tell(message)
                descriptors = [self.channel.fileno(), self._wake_read, *self.source.descriptors()]
                readable, _, _ = select.select(descriptors, [], [], self._timeout())
                if self._wake_read in readable:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                self._reap()
                self._kill_overdue()
                if self.channel.fileno() in readable and not self._obey():
                    return
        finally:
            self._end_all()

    def _obey(self) -> bool:
        try:
            data = self.channel.recv(_MESSAGE_BYTES)
        except (
            ConnectionResetError
        ):  # it closed before it had read all that we told it: an end like any other
            data = b""
        if not data:
            return False
        match messages.decode_supervisor_to_standby(data):
            case Spawn(spec=spec):
                self.source.start(spec)
            case Kill(runtime=runtime, grace_s=grace_s):
                self.source.cancel(runtime)
                for pid in [pid for pid, name in self.workers.items() if name == runtime]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
                    self.deadlines[pid] = time.monotonic() + grace_s
        return True

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0:
                break
            exit_code = os.waitstatus_to_exitcode(status)
            runtime = self.workers.pop(pid, None)
            if runtime is not None:
                self.ending[pid] = (runtime, exit_code)
                self.deadlines.pop(pid, None)
            elif self.source.lost(pid, exit_code):
                kill_session(pid)
        for pid, (runtime, exit_code) in list(self.ending.items()):
            if not kill_session(pid):
                del self.ending[pid]
                self._tell(WorkerExited(runtime=runtime, pid=pid, exit_code=exit_code))

    def _kill_overdue(self) -> None:
        now = time.monotonic()
        for pid, deadline in list(self.deadlines.items()):
            if now >= deadline:
                del self.deadlines[pid]
                kill_session(pid)

    def _end_all(self) -> None:
        """Kill every session and see the last process go: all their orphans are our children by then."""
        for pid in [*self.workers, *self.ending, *self.source.leaders()]:
            kill_session(pid)
        deadline = time.monotonic() + _END_WITHIN_S
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(_LOOK_AGAIN_S)

    def _timeout(self) -> float | None:
        if self.ending:
            return _LOOK_AGAIN_S  # a killed session's last process may be an adopted orphan whose end comes by SIGCHLD
        times = list(self.deadlines.values())
        if (next_at := self.source.next_at()) is not None:
            times.append(next_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _tell(self, message: StandbyToSupervisor) -> None:
        self.channel.send(messages.encode_json(message))


def one_card(index: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make the card of this index the only one, which is then number 0 to all of CUDA and SGLang.

    Counted as nvidia-smi does (by PCI bus), or within what the user has made visible.

    Raises:
        ConfigError: fewer cards than that are visible.
    """
    card = {VISIBLE: card_id(index, environment)}
    return card if environment.get(VISIBLE) else {ORDER: BUS_ORDER, **card}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_sgl.engine.standby", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="our end of the supervisor's socket pair")
    parser.add_argument("--kind", choices=("host", "cuda"), required=True)
    parser.add_argument("--index", type=int, default=0, help="index of the device among its kind")
    parser.add_argument(
        "--waiting", type=int, default=0, help="workers that wait from the start; of a host, 0: fork them"
    )
    parser.add_argument(
        "--expected", type=int, default=0, help="starts that follow each other at the beginning"
    )
    parser.add_argument("--cores", type=int, help="cores that imports may use; default: all of this process")
    arguments = parser.parse_args()
    adopt_orphans()
    # The supervisor ends us by closing the socket pair, and its death by PDEATHSIG, which it sets for us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    channel = socket.socket(fileno=arguments.fd)
    channel.set_inheritable(False)  # the supervisor must see its end when we are gone, whoever lives on
    cores = arguments.cores or len(os.sched_getaffinity(0))
    Standby(channel, _source(arguments, cores, channel)).run()
    # No interpreter shutdown: torch and SGLang need seconds for it, and nothing of ours is left to close.
    os._exit(0)


def _source(arguments: argparse.Namespace, cores: int, channel: socket.socket) -> WorkerSource:
    kind: str = arguments.kind
    # Workers of a card cannot be forked; if none shall wait, one is started when it is wanted.
    if arguments.waiting or kind == "cuda":
        environment = dict(os.environ)
        if kind == "cuda":
            environment |= one_card(arguments.index, environment)
        command = [sys.executable, "-m", "prism_sgl.engine.waiting", "--kind", kind]
        first = min(arguments.waiting, cores)
        return WaitingRoom(command, environment, first=first, expected=arguments.expected, cores=cores)
    spec_channel.announce_device_kind(kind)
    from prism_sgl.engine.forking import ForkingSource

    return ForkingSource(channel)


if __name__ == "__main__":
    main()
