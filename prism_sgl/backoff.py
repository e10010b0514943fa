"""How long to wait before a process that ended is started again."""

from __future__ import annotations

_FIRST_S = 0.1
_LONGEST_S = 5.0
_LIVED_WELL_S = 30.0


class Backoff:
    """0.1 s, doubling to 5 s; from the start again after a life of 30 s."""

    def __init__(self) -> None:
        self._next_s = _FIRST_S

    def after(self, lived_s: float) -> float:
        if lived_s >= _LIVED_WELL_S:
            self._next_s = _FIRST_S
        wait_s = self._next_s
        self._next_s = min(self._next_s * 2, _LONGEST_S)
        return wait_s
