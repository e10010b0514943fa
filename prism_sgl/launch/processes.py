"""Processes as the kernel sees them: when one began, who is in its session, and how to end all of those."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_END_WITHIN_S = 10.0


class Stat(NamedTuple):
    """Part of /proc/PID/stat."""

    state: str
    parent: int
    session: int
    start_ticks: int  # since boot: with the pid it names a process for ever


def read_stat(pid: int) -> Stat | None:
    """None: there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return Stat(state=fields[0], parent=int(fields[1]), session=int(fields[3]), start_ticks=int(fields[19]))


def session_members(session: int) -> list[int]:
    """Living processes of this session."""
    return [pid for pid, stat in _living().items() if stat.session == session]


def _living() -> dict[int, Stat]:
    """All processes but zombies, which only wait for their parent and hold nothing."""
    stats = {int(entry): read_stat(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    return {pid: stat for pid, stat in stats.items() if stat is not None and stat.state != "Z"}


def _members_and_descendants(sessions: Iterable[int]) -> list[int]:
    """A child that has just begun a session of its own is recorded nowhere yet, but has its parent."""
    living = _living()
    wanted = set(sessions)
    found = {pid for pid, stat in living.items() if stat.session in wanted}
    while more := {pid for pid, stat in living.items() if stat.parent in found} - found:
        found |= more
    return sorted(found)


def end_sessions(sessions: Iterable[int]) -> list[int]:
    """SIGKILL these sessions with all descendants, wait until none is left, and answer who was killed.

    Blocks. Looks again after each round, because a process may have forked while it was being killed.
    """
    wanted = list(sessions)
    killed: list[int] = []
    deadline = time.monotonic() + _END_WITHIN_S
    while members := _members_and_descendants(wanted):
        if time.monotonic() > deadline:
            break
        _kill_and_wait(members, deadline)
        killed += members
    return killed


def _kill_and_wait(pids: list[int], deadline: float) -> None:
    poll = select.poll()
    open_fds: set[int] = set()
    try:
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            open_fds.add(fd)
            poll.register(fd, select.POLLIN)
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        waiting = set(open_fds)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                poll.unregister(fd)
                waiting.discard(fd)
    finally:
        for fd in open_fds:
            os.close(fd)
