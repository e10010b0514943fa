"""One child process of the supervisor: in a session of its own, dead when we are, its end a future."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_sgl.launch import exec_child

_STAMP = re.compile(r"^\[\d[^]]*\] ")  # with which SGLang begins a line
_OUR_ERROR = re.compile(r"\d{4}-\d\d-\d\d \S+ ERROR ")  # "2026-11-29 11:50:26,123 ERROR prism_sgl..."


class Child:
    """A running process. ``exited`` becomes its exit code (negative: killed by that signal)."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.pid = popen.pid
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def send_signal(self, number: signal.Signals) -> None:
        if not self.exited.done():
            self._popen.send_signal(number)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._popen.wait()
        if not self.exited.done():
            self.exited.set_result(code)


def start_child(
    name: str, module: str, args: Sequence[str], *, env: Mapping[str, str], log: Path, fds: Sequence[int] = ()
) -> Child:
    """``python -m module args``. Only from the main thread: its end is what the death signal follows."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have tidied up there
    # Its own session: ^C in the terminal reaches the supervisor alone, which then stops in order.
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as sink:
        popen = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                exec_child.__file__,
                str(os.getpid()),
                sys.executable,
                "-m",
                module,
                *args,
            ],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(env),
            pass_fds=tuple(fds),
            start_new_session=True,
        )
    try:
        return Child(name, popen)
    except OSError:  # no descriptor left to watch it by: nobody would know of it
        popen.kill()
        popen.wait()
        raise


def why_ended(code: int, log: Path, *, served: bool = False) -> str:
    """What can be said beyond the exit code of a process that was not meant to end: mostly a line of its log's end.

    That is the last error, else the last line if it ended by itself. Of one that has ``served`` that line is left out,
    it may be somebody's request; and if it was killed errors too, which are older. One that has not served is quoted
    even if it was killed, for SGLang kills all its own processes when a model does not load.
    """
    killed = -code in (signal.SIGKILL, signal.SIGTERM)
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (64 << 10)))
            lines = [_STAMP.sub("", line) for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        lines = []
    telling = [] if killed and served else [line for line in lines if _tells(line)]
    if not telling and code >= 0 and not served:
        telling = [line for line in lines if line.strip()]
    if telling:
        return telling[-1].strip()[:300]
    return "perhaps for want of memory, then dmesg says so" if code == -signal.SIGKILL else ""


def _tells(line: str) -> bool:
    # "prism_sgl.errors.SeamError: ...", "RuntimeError: ...", but not the indented source above them.
    first = line.split(":", 1)[0]
    return (
        bool(line)
        and not line[0].isspace()
        and (
            first.rsplit(".", 1)[-1].endswith(("Error", "Exception", "Exit", "Interrupt"))
            or _OUR_ERROR.match(line) is not None
        )
    )
