"""What processes of the engine room do to themselves and their sessions: die with the parent, log to a file, end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL to this process when its parent dies, or now if it is dead already.

    The kernel watches the thread that started us, so parents start children from their main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Grandchildren whose parent dies become our children, so that we can tell when the last one is gone."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def log_to(path: str) -> None:
    """Standard output and error of this process and its children go to this file (0600), appended."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def run_to_exit(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and end this process with its exit code, without an interpreter shutdown.

    torch and SGLang need seconds for theirs, and a forked process must not run its parent's exit handlers.
    """
    code = 1
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_session(leader: int) -> bool:
    """SIGKILL the leader's process group; False when no process of it is left."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
