"""The lease of what an engine holds beside pages, and how far torch may go beyond it; on a card told by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.allocator.vmm import GRANULE_BYTES
from prism_sgl.engine import overhead
from prism_sgl.engine.overhead import Overhead
from prism_sgl.engine.runtime_memory import RuntimeMemory
from prism_sgl.engine.strangers import Strangers

MIB = 1 << 20
BUDGET = 1000  # granules


class Card:
    """An engine with 600 MiB of context and graphs, 100 MiB of torch's and a neighbour on one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.owner, self.neighbour = (
            ledger.join(name, floor=0, ceiling=BUDGET, priority=0, bell="") for name in ("unit", "other")
        )
        self.torch_bytes = 100 * MIB
        self.base_bytes = 600 * MIB
        self.caps: list[int] = []
        self.kv = self.weights = None
        self.strangers = Strangers("gpu0", ledger, lambda: None)
        self.bell = SimpleNamespace(wait=lambda seconds: None)
        self.asked: list[int] = []
        self.ask_neighbours = self.asked.append
        self.device = SimpleNamespace(
            used_bytes=lambda: self.base_bytes + self.torch_bytes, cap_torch=self.caps.append
        )
        self.overhead = Overhead(self)  # type: ignore[arg-type]

    insist = RuntimeMemory.insist
    device_shortages = RuntimeMemory.device_shortages

    def pages_bytes(self) -> int:
        return 0

    @property
    def leased_mib(self) -> int:
        return self.owner.held(Kind.OVERHEAD) * GRANULE_BYTES // MIB


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    path = str(tmp_path / "ledger")
    Ledger.create(path, BUDGET * GRANULE_BYTES, "gpu0").close()
    with Ledger.open(path) as ledger:
        card = Card(ledger)
        monkeypatch.setattr(overhead, "_torch_bytes", lambda: card.torch_bytes)
        monkeypatch.setattr(overhead, "_LOOK_EVERY_S", 0.0)
        yield card


def test_what_is_used_and_what_a_pass_will_take_is_leased(card: Card) -> None:
    assert card.overhead.settle(300 * MIB)
    assert card.leased_mib == 1000
    assert card.overhead.settle(0)
    assert card.leased_mib == 700, "asleep, the allowance goes back"


def test_no_room_for_activations_is_said(card: Card) -> None:
    assert card.overhead.settle(0)
    assert card.neighbour.try_reserve(Kind.KV, 600)
    assert not card.overhead.settle(300 * MIB, 0.0)
    assert card.leased_mib == 700, "all or nothing"
    assert card.asked == []
    assert not card.overhead.settle(300 * MIB, 0.01)
    assert card.asked, "neighbours were asked for it"


def test_torch_is_capped_at_its_lease_and_what_the_budget_has_free(card: Card) -> None:
    card.overhead.settle(300 * MIB)
    card.overhead.cap()
    free_mib = BUDGET * 2 - 1000
    assert card.caps[-1] == (400 + free_mib + 512) * MIB
    assert card.neighbour.try_reserve(Kind.KV, BUDGET - 500)  # all of it
    card.overhead.look(in_a_hurry=False)
    assert card.caps[-1] == (400 + 512) * MIB, "what a neighbour has leased is not torch's to take"


def test_what_torch_took_beyond_its_lease_is_leased_as_soon_as_it_is_seen(
    card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    card.overhead.settle(300 * MIB)
    card.torch_bytes = 600 * MIB
    card.overhead.look(in_a_hurry=False)
    assert card.leased_mib == 1200
    assert "1200 MiB beside pages, more than foreseen" in caplog.text
    card.overhead.look(in_a_hurry=False)
    assert len(caplog.records) == 1, "once"


def test_torch_keeps_what_it_has_where_that_cannot_be_leased(card: Card) -> None:
    card.overhead.settle(0)
    assert card.neighbour.try_reserve(Kind.KV, BUDGET - 350)
    card.torch_bytes = 500 * MIB
    card.overhead.look(in_a_hurry=False)
    assert card.leased_mib == 700
    assert card.caps[-1] == (500 + 512) * MIB
    card.neighbour.release(Kind.KV, 300)
    card.overhead.look(in_a_hurry=False)
    assert card.leased_mib == 1100, "leased when there is room"


def test_on_the_host_there_is_nothing_to_lease_or_to_cap(card: Card) -> None:
    card.device.used_bytes = lambda: 0
    assert card.overhead.settle(300 * MIB)
    card.overhead.look(in_a_hurry=False)
    card.overhead.cap()
    assert card.leased_mib == 0
    assert card.caps == []
