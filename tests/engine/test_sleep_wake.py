"""Waking when the device fails in the middle, without an engine around it."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_sgl.allocator.image import Image
from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.allocator.weights import WeightsArena
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.engine.sleep_wake import prism_wake
from prism_sgl.errors import VmmError
from prism_sgl.messages import RuntimeState
from tests.allocator.failing_calls import FailingCalls

PAGE = 2 << 20


def test_a_driver_error_while_waking_leaves_a_sleeper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "ledger")
    Ledger.create(path, 8 * PAGE, "host0").close()
    with Ledger.open(path) as ledger:
        owner = ledger.join("unit", floor=0, ceiling=8, priority=0, bell="")
        calls = FailingCalls()
        image = Image.create("unit", 4 * PAGE)
        image.seal()
        weights = WeightsArena(HostArena("unit:weights", 4, PAGE, calls), owner, image)
        memory = SimpleNamespace(
            owner=owner,
            weights=weights,
            arrival=object(),
            safe_point=SimpleNamespace(asleep=True),
            insist=lambda attempt, wanted_bytes, timeout_s: attempt(),
        )
        monkeypatch.setattr(RuntimeMemory, "current", lambda: memory)
        calls.broken, calls.errno = {"map"}, errno.EIO
        with pytest.raises(VmmError):
            prism_wake(object(), timeout_s=1.0, wait=True)
        assert owner.view.state is RuntimeState.ASLEEP
        assert owner.held(Kind.WEIGHTS) == 0
        assert memory.safe_point.asleep
        owner.leave()
