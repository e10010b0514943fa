"""Seals of a memory file that processes share: what one has filled, the others can trust to stay.

Maker and keeper of an image both seal it, so the rule stands in one place.
"""

from __future__ import annotations

import fcntl

# Not F_SEAL_WRITE: that one waits for every writable mapping to go, and an image's maker keeps his, page-locked.
_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, kernel 5.1; Python has no name for it
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def seal(fd: int) -> None:
    """From now on nobody can map it for writing, write to it, change its size or take this back.

    Who has it mapped for writing already still writes: see to that before.

    Raises:
        OSError: it is no memory file that allows seals, or the kernel is older than 5.1.
    """
    if not is_sealed(fd):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def is_sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # no memory file: nothing can seal it
        return False
