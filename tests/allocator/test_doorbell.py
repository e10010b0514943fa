from __future__ import annotations

import errno
import os
import select
import socket
import stat
from pathlib import Path

import pytest

from prism_sgl.allocator.doorbell import Doorbell, ring
from prism_sgl.errors import LedgerError


def test_a_ring_wakes_whoever_polls(tmp_path: Path) -> None:
    bell = Doorbell(str(tmp_path / "bell-1"))
    assert not bell.drain()
    for _ in range(3):
        ring(bell.path)
    assert select.select([bell], [], [], 0)[0] == [bell]
    assert bell.wait(60)
    assert not bell.wait(0)
    bell.close()


def test_ringing_a_full_or_a_missing_bell_does_no_harm(tmp_path: Path) -> None:
    bell = Doorbell(str(tmp_path / "bell-1"))
    for _ in range(3000):
        ring(bell.path)
    assert bell.drain()
    bell.close()
    ring(bell.path)
    ring("")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(bell.path)  # a file that nobody listens on any more
    ring(bell.path)


def test_who_rings_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the middle of its books: what it has just returned would be returned again."""

    def no_descriptor(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    bell = Doorbell(str(tmp_path / "bell-1"))
    monkeypatch.setattr("prism_sgl.allocator.doorbell.socket.socket", no_descriptor)
    ring(bell.path)
    monkeypatch.undo()
    bell.close()


def test_a_bell_is_private_and_replaces_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "bell-1"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
        dead.bind(str(path))
    bell = Doorbell(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not os.get_inheritable(bell.fileno())
    bell.close()
    bell.close()
    assert not path.exists()


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="run_dir"):
        Doorbell(str(tmp_path / ("x" * 120)))
