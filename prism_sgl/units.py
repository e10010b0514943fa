"""Sizes and durations as people write them: ``"64MiB"``, ``"5m"``; and back again for messages."""

from __future__ import annotations

import math
import re

GRANULE_BYTES = 2 << 20  # what ledgers count in; page sizes and budgets are multiples of it

_BYTES = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: object) -> int | None:
    """Bytes of ``"1GiB"``, ``"64MiB"``, ``"10MB"`` or a whole number; None if it is no size."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if value >= 0 else None
    if not isinstance(value, str) or (match := _NUMBER_AND_UNIT.fullmatch(value)) is None:
        return None
    factor = _BYTES.get(match[2].lower())
    return None if factor is None else int(float(match[1]) * factor)


def parse_duration(value: object) -> float | None:
    """Seconds of ``"45s"``, ``"5m"``, ``"200ms"``, ``"1h"`` or a number of seconds; None if it is none."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) and value >= 0 else None
    if not isinstance(value, str) or (match := _NUMBER_AND_UNIT.fullmatch(value)) is None:
        return None
    factor = _SECONDS.get(match[2].lower())
    return None if factor is None else float(match[1]) * factor


def show_size(size_bytes: int) -> str:
    """The shortest spelling, two digits after the point at most: ``64MiB``, ``1.5GiB``."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f}".rstrip("0").rstrip(".") + unit
    return f"{size_bytes}B"


def round_up(size_bytes: int, unit_bytes: int) -> int:
    return -(-size_bytes // unit_bytes) * unit_bytes


def granules(size_bytes: int) -> int:
    """As many granules as these bytes need."""
    return -(-size_bytes // GRANULE_BYTES)


def round_down(size_bytes: int, unit_bytes: int) -> int:
    return size_bytes // unit_bytes * unit_bytes
