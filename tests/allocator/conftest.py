"""A real ledger in a file of its own, and owners that can sit in other processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_sgl.allocator.ledger import Ledger, Owner
from prism_sgl.messages import RuntimeState
from prism_sgl.units import GRANULE_BYTES
from tests.allocator.backends import BACKENDS, Backend

BUDGET = 100


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(str(tmp_path / "host0.ledger"), BUDGET * GRANULE_BYTES, "host0") as ledger:
        yield ledger
        ledger.check()


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture
def owner(ledger: Ledger) -> Owner:
    return join(ledger, "chat")


def join(
    ledger: Ledger, name: str, *, floor: int = 0, ceiling: int = BUDGET, priority: int = 0, bell: str = ""
) -> Owner:
    """An owner that is awake and idle since time 0."""
    owner = ledger.join(name, floor=floor, ceiling=ceiling, priority=priority, bell=bell)
    owner.set_state(RuntimeState.AWAKE)
    owner.set_activity(False, 0, 0)
    return owner
