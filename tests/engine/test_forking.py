"""A host's standby that forks, without SGLang's imports: what a fork that fails costs."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_sgl.engine import forking
from prism_sgl.engine.forking import ForkingSource
from prism_sgl.launch.children import why_ended
from prism_sgl.messages import RuntimeId, StandbyReady, WorkerExited
from tests.engine.specs import runtime_spec

CHAT, CODE = RuntimeId("chat@host0.1"), RuntimeId("code@host0.2")


def no_fork() -> int:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkingSource]:
    monkeypatch.setattr(forking, "_import_all", lambda: None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        source = ForkingSource(ours)
        (ready,) = source.step([])
        assert isinstance(ready, StandbyReady)
        yield source


def test_fork_that_fails_is_a_worker_that_died_at_once(
    source: ForkingSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", no_fork)
    log = tmp_path / "chat.log"
    source.start(runtime_spec(runtime=CHAT, log_path=str(log)))
    source.start(runtime_spec(runtime=CODE, log_path=str(tmp_path / "gone" / "code.log")))
    assert source.step([]) == [
        WorkerExited(runtime=CHAT, pid=0, exit_code=1),
        WorkerExited(runtime=CODE, pid=0, exit_code=1),
    ]
    assert why_ended(1, log) == "ForkError: [Errno 11] Resource temporarily unavailable"
    assert source.step([]) == [], "no spec is tried again"
