from __future__ import annotations

import pytest

from prism_sgl.units import parse_duration, parse_size, round_down, round_up, show_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1GiB", 1 << 30),
        ("64 mib", 64 << 20),
        ("1.5KiB", 1536),
        ("2TB", 2 * 10**12),
        ("10MB", 10**7),
        ("7", 7),
        (0, 0),
        (True, None),
        (-1, None),
        (1.5, None),
        ("-1MiB", None),
        ("1e3", None),
        ("MiB", None),
        ("1 fort", None),
        ([], None),
    ],
)
def test_sizes(text: object, size_bytes: int | None) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45.0), ("5m", 300.0), ("200ms", 0.2), ("1.5h", 5400.0), (3, 3.0), (0.5, 0.5)]
    + [(bad, None) for bad in ("5", "5 days", "", -1, float("inf"), float("nan"), False, None)],
)
def test_durations(text: object, seconds: float | None) -> None:
    if text == "5":
        assert parse_duration(text) is None, "a text without a unit says nothing"
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("size_bytes", [0, 1, 1023, 1 << 10, 3 << 19, 64 << 20, 5 << 30])
def test_shown_size_reads_back(size_bytes: int) -> None:
    assert parse_size(show_size(size_bytes)) == size_bytes


def test_rounding() -> None:
    assert (round_up(5, 4), round_up(4, 4), round_down(5, 4)) == (8, 4, 4)
