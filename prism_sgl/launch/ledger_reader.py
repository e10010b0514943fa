"""Who holds device memory, read from the ledgers: for metrics, and for who asks how models are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism_sgl.allocator.ledger import Ledger
from prism_sgl.units import GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class OwnerMemory:
    model: str
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    device: str
    free_bytes: int
    returning_bytes: int  # left by dead owners, not shown free by the device yet
    owners: Sequence[OwnerMemory]

    def of(self, model: str) -> OwnerMemory:
        """What all runtimes of a model hold here; nothing, if it has none."""
        mine = [owner for owner in self.owners if owner.model == model]
        return OwnerMemory(
            model=model,
            weights_bytes=sum(owner.weights_bytes for owner in mine),
            kv_bytes=sum(owner.kv_bytes for owner in mine),
            overhead_bytes=sum(owner.overhead_bytes for owner in mine),
        )


ReadMemory = Callable[[], Sequence[DeviceMemory]]


class LedgerReader:
    """Owner of the open ledgers; opened at the first read."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths
        self._ledgers: dict[str, Ledger] = {}

    def __call__(self) -> list[DeviceMemory]:
        return [self._read(device) for device in self._paths]

    def close(self) -> None:
        for ledger in self._ledgers.values():
            ledger.close()
        self._ledgers.clear()

    def _read(self, device: str) -> DeviceMemory:
        ledger = self._ledgers.get(device)
        if ledger is None:
            ledger = self._ledgers[device] = Ledger.open(self._paths[device])
        owners = ledger.owners()  # once, so that all of it is of one moment
        returning = sum(owner.held for owner in owners if not owner.alive)
        return DeviceMemory(
            device=device,
            free_bytes=(ledger.budget - sum(owner.held for owner in owners)) * GRANULE_BYTES,
            returning_bytes=returning * GRANULE_BYTES,
            owners=[
                OwnerMemory(
                    model=owner.name.rpartition("@")[0] or owner.name,
                    weights_bytes=owner.weights * GRANULE_BYTES,
                    kv_bytes=owner.kv * GRANULE_BYTES,
                    overhead_bytes=owner.overhead * GRANULE_BYTES,
                )
                for owner in owners
                if owner.alive
            ],
        )


def parse_ledgers(text: str) -> dict[str, str]:
    """``host0=/dev/shm/a.ledger,host1=/dev/shm/b.ledger``"""
    return dict(part.split("=", 1) for part in text.split(",") if part)
