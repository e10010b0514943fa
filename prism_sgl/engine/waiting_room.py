"""Workers that wait: processes that have done their imports and block until they are given a spec.

One process of a card's engine costs 25 to 35 s of imports and cannot be forked from another (CUDA does not
survive it), so they are started before anybody needs them. Each waiting worker is three processes: itself and
the two that SGLang will need (waiting.py). A spec that comes when none is ready waits here, first come first
served, and the first that becomes ready takes it.
"""

from __future__ import annotations

import enum
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from prism_sgl import messages
from prism_sgl.backoff import Backoff
from prism_sgl.errors import describe_exit
from prism_sgl.messages import (
    Imported,
    ImportsFailed,
    RuntimeId,
    RuntimeSpec,
    Spawned,
    StandbyReady,
    StandbyToSupervisor,
    TakeSpec,
    WorkerExited,
)

log = logging.getLogger(__name__)
_MESSAGE_BYTES = 1 << 16
_PROCESSES_EACH = 3  # worker, scheduler, detokenizer: a core for each while they import
_TRIES = 2  # the first death may be chance; after the second a spec that waits is told the reason


class _State(enum.Enum):
    IMPORTING = enum.auto()
    READY = enum.auto()
    ENDING = enum.auto()  # its channel is closed; SIGCHLD follows


@dataclass
class _Waiter:
    pid: int
    channel: socket.socket
    state: _State = _State.IMPORTING
    reason: str = ""  # why its imports failed, in its own words


class WaitingRoom:
    """Owns the waiting workers and the specs that wait for one. A WorkerSource.

    ``first`` workers wait while the ``expected`` models of models.toml start, fewer for the last of them: those that
    are next import while others load. Then one: later starts come one by one, and a waiting worker costs host memory,
    of a card nothing. With 0 none waits before there is a spec. ``cores``: of all that import on this host, this room's
    part.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, first: int, expected: int, cores: int
    ) -> None:
        self._command = command
        self._environment = dict(environment)
        self._first = self._num_wanted = first
        self._num_expected = expected
        self._num_importing_at_most = max(1, cores // _PROCESSES_EACH)
        self._waiters: dict[int, _Waiter] = {}
        self._specs: deque[tuple[RuntimeSpec, float]] = deque()  # and since when
        self._untold: list[StandbyToSupervisor] = []
        self._said_ready = False
        self._num_failures = 0  # one after the other
        self._backoff = Backoff()
        self._not_before = 0.0

    def start(self, spec: RuntimeSpec) -> None:
        self._specs.append((spec, time.monotonic()))

    def cancel(self, runtime: RuntimeId) -> None:
        for spec, since in [entry for entry in self._specs if entry[0].runtime == runtime]:
            self._specs.remove((spec, since))
            self._untold.append(WorkerExited(runtime=runtime, pid=0, exit_code=-signal.SIGTERM))

    def descriptors(self) -> list[int]:
        return [w.channel.fileno() for w in self._waiters.values() if w.state is not _State.ENDING]

    def next_at(self) -> float | None:
        return self._not_before if self._has_room() else None  # else step would have started one

    def leaders(self) -> list[int]:
        return list(self._waiters)

    def step(self, readable: Collection[int]) -> list[StandbyToSupervisor]:
        for waiter in list(self._waiters.values()):
            if waiter.state is not _State.ENDING and waiter.channel.fileno() in readable:
                self._hear(waiter)
        self._hand_out()
        while self._has_room() and time.monotonic() >= self._not_before:
            self._start_one()
        told, self._untold = self._untold, []
        return told

    def lost(self, pid: int, exit_code: int) -> bool:
        waiter = self._waiters.get(pid)
        if waiter is None:
            return False
        if waiter.state is _State.IMPORTING:
            self._hear(waiter)  # its last words may lie in the socket
        del self._waiters[pid]
        waiter.channel.close()
        self._failed(f"waiting worker {pid} ended: {waiter.reason or describe_exit(exit_code)}", exit_code)
        return True

    # -- waiting workers

    def _hear(self, waiter: _Waiter) -> None:
        """One message, or the end of the channel."""
        try:
            frame = waiter.channel.recv(_MESSAGE_BYTES)
        except OSError:
            frame = b""
        if not frame:
            waiter.state = _State.ENDING
            return
        try:
            message = messages.decode_waiting_to_standby(frame)
        except messages.DECODE_ERRORS as error:
            waiter.reason = f"its message of {len(frame)} bytes does not decode: {error}"
            waiter.state = _State.ENDING
            waiter.channel.close()  # which ends it
            return
        match message:
            case Imported(seconds=seconds):
                waiter.state = _State.READY
                self._num_failures = 0
                self._backoff = Backoff()
                log.info("waiting worker %d is ready: imports %.1f s", waiter.pid, seconds)
                if not self._said_ready:
                    self._said_ready = True
                    self._untold.append(StandbyReady(seconds=seconds))
            case ImportsFailed(reason=reason):
                waiter.reason = reason

    def _hand_out(self) -> None:
        for waiter in [w for w in self._waiters.values() if w.state is _State.READY]:
            if not self._specs:
                return
            spec, since = self._specs[0]
            try:
                waiter.channel.send(messages.encode_json(TakeSpec(spec=spec, wanted_at_s=since)))
            except OSError:  # it has died: the next one gets the spec
                waiter.state = _State.ENDING
                continue
            self._specs.popleft()
            del self._waiters[waiter.pid]
            waiter.channel.close()
            self._num_expected -= 1
            self._num_wanted = max(1, min(self._first, self._num_expected))
            log.info("waiting worker %d becomes %s", waiter.pid, spec.runtime)
            self._untold.append(Spawned(runtime=spec.runtime, pid=waiter.pid))

    def _has_room(self) -> bool:
        """One more is wanted, and may import beside those that do."""
        missing = max(self._num_wanted, len(self._specs)) - len(self._waiters)
        importing = sum(w.state is _State.IMPORTING for w in self._waiters.values())
        return missing > 0 and importing < (1 if self._num_failures else self._num_importing_at_most)

    def _start_one(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)  # the only one: we have one thread, and no other start is under way
            command = [*self._command, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
            try:
                pid = os.posix_spawn(command[0], command, self._environment, setsid=True)
            except OSError as error:
                ours.close()
                self._failed(f"a waiting worker could not be started: {error}", 1)
                return
        self._waiters[pid] = _Waiter(pid, ours)

    def _failed(self, reason: str, exit_code: int) -> None:
        self._num_failures += 1
        wait_s = self._backoff.after(0.0)
        self._not_before = time.monotonic() + wait_s
        log.error("%s; the next one starts in %g s", reason, wait_s)
        if self._num_failures < _TRIES:
            return
        for spec, _ in self._specs:
            self._untold.append(never_began(spec, f"WaitingWorkerError: {reason}", exit_code or 1))
        self._specs.clear()


def never_began(spec: RuntimeSpec, reason: str, exit_code: int) -> WorkerExited:
    """What the supervisor is told of a spec that no process ever had."""
    try:
        # The supervisor reads the reason where it reads those of all workers.
        with open(spec.log_path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(f"{reason}\n".encode(errors="replace"))
    except OSError as error:  # no folder, no room: no cause to end the other workers
        log.error("%s never began: %s; its log cannot be written: %s", spec.runtime, reason, error)
    return WorkerExited(runtime=spec.runtime, pid=0, exit_code=exit_code)
