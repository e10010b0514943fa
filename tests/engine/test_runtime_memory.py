"""Asking neighbours that do not answer: they are named once, and the others are asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.engine import runtime_memory
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.engine.sleep_wake import prism_quota
from prism_sgl.messages import RuntimeState
from tests.engine.specs import runtime_spec

BUDGET = 40


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RuntimeMemory]:
    path = str(tmp_path / "ledger")
    Ledger.create(path, BUDGET * GRANULE_BYTES, "host0").close()
    monkeypatch.setattr(runtime_memory, "TARGET_DEADLINE_S", 0.05)
    # With a floor: so it has a right to what it asks for, and whoever does not give it is named.
    spec = runtime_spec(ledger_path=path, run_dir=str(tmp_path), floor_bytes=8 * GRANULE_BYTES)
    memory = RuntimeMemory(spec)
    yield memory
    memory.owner.leave()
    memory.ledger.close()


def test_who_starts_has_a_right_to_memory_as_who_wakes(memory: RuntimeMemory) -> None:
    """Until it has KV: ``min_kv`` is 0 by default, and its engine tells only later what one request needs."""
    spec = replace(memory.spec, runtime="starts", floor_bytes=0)
    starting = RuntimeMemory(spec)
    neighbour = memory.owner
    neighbour.set_state(RuntimeState.AWAKE)
    neighbour.set_activity(True, 0, 1)
    assert neighbour.try_reserve(Kind.KV, BUDGET)
    starting.ask_neighbours(30)
    target = neighbour.target()
    assert target is not None and target.enforced == BUDGET - 30
    starting.owner.leave()
    starting.ledger.close()


def test_a_floor_is_of_whole_pages(memory: RuntimeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only pages are given: one that gives a page with a part of its floor may take it back by right, and so on."""
    page_bytes = 4 * GRANULE_BYTES
    memory.kv = SimpleNamespace(pages=SimpleNamespace(page_bytes=page_bytes))  # type: ignore[assignment]
    monkeypatch.setattr(RuntimeMemory, "_current", memory)
    prism_quota(None, floor_bytes=page_bytes + 1, ceiling_bytes=BUDGET * GRANULE_BYTES)
    assert memory.owner.view.floor == 8


def test_a_victim_that_does_not_answer_is_named_once_and_blocks_nobody(
    memory: RuntimeMemory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ledger = memory.ledger
    silent, helpful = (
        ledger.join(name, floor=0, ceiling=BUDGET, priority=0, bell="") for name in ("silent", "helpful")
    )
    for owner, granules in ((silent, 30), (helpful, 10)):
        assert owner.try_reserve(Kind.KV, granules)
        owner.set_state(RuntimeState.AWAKE)
    memory.owner.set_state(RuntimeState.AWAKE)

    def attempt() -> bool:
        target = helpful.target()  # it answers at its safe points
        if target is not None:
            helpful.release(Kind.KV, helpful.held(Kind.KV) - target.granules)
            helpful.answer_target(target.seq)
        return memory.owner.try_reserve(Kind.KV, 8)

    began = time.monotonic()
    assert memory.insist(attempt, 8 * GRANULE_BYTES, timeout_s=5.0)
    assert time.monotonic() - began < 2.0
    assert memory.owner.held(Kind.KV) == 8
    late = [r.message for r in caplog.records if "did not give memory" in r.message]
    assert late == ["silent did not give memory within 0.05 s; others are asked"]
    for owner in (silent, helpful):
        owner.leave()
