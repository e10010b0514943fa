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
    session: int
    start_ticks: int  # since boot: with the pid it names a process for ever


def read_stat(pid: int) -> Stat | None:
    """None: there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
    return Stat(state=fields[0], session=int(fields[3]), start_ticks=int(fields[19]))


def session_members(session: int) -> list[int]:
    """Living processes of this session; a zombie only waits for its parent and holds nothing."""
    found = []
    for entry in os.listdir("/proc"):
        if (
            entry.isdigit()
            and (stat := read_stat(int(entry)))
            and stat.session == session
            and stat.state != "Z"
        ):
            found.append(int(entry))
    return found


def end_sessions(sessions: Iterable[int]) -> list[int]:
    """SIGKILL every process of these sessions and wait until none is left. Answers the pids that were killed.

    Blocks. Looks again after each round, because a process may have forked while it was being killed.
    """
    wanted = list(sessions)
    killed: list[int] = []
    deadline = time.monotonic() + _END_WITHIN_S
    while members := [pid for session in wanted for pid in session_members(session)]:
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
