"""Named places where a process may die at the worst moment.

Tests replace ``crash_point`` by one that stops the process there, then send it SIGKILL and look at what the
survivors see. In production it does nothing. Callers go through the module (``crash_points.crash_point(...)``),
so that one replacement reaches all of them.
"""

from __future__ import annotations

NAMES = ("in_lock", "between_reserve_and_map", "between_unmap_and_return", "while_posting_target")


def crash_point(name: str) -> None:
    """Pass the place called ``name``, one of ``NAMES``."""
