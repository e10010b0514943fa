"""The shared-memory table of one device: who holds how much of its budget. Counted in granules of 2 MiB.

The supervisor creates and removes it; runtimes join and become owners; anybody may read. Invariant: the sum of
all leases never exceeds the budget, whichever process is killed at whatever instruction.
"""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType

from prism_sgl.allocator import crash_points
from prism_sgl.allocator.ledger_lock import Life
from prism_sgl.allocator.ledger_table import (
    FIRST_LIFE_BYTE,
    MAX_BELL_BYTES,
    MAX_NAME_BYTES,
    NUM_SLOTS,
    STATES,
    Column,
    LedgerTable,
    create_file,
)
from prism_sgl.allocator.ledger_views import Kind, OwnerView, Posted, Target, Totals
from prism_sgl.allocator.owner import Owner
from prism_sgl.errors import LedgerError
from prism_sgl.messages import RuntimeState
from prism_sgl.units import GRANULE_BYTES

__all__ = ["Kind", "Ledger", "Owner", "OwnerView", "Posted", "Target", "Totals"]


# Long after its end a process's memory is back with the device, if it ever comes.
DRIVER_RETURNS_S = 2.0


class Ledger:
    """One process's access to the ledger of one device. Threads may share it, and it survives a fork."""

    def __init__(self, table: LedgerTable) -> None:
        self._table = table
        self._seen_dead: dict[tuple[int, int], float] = {}  # slot and epoch, since when

    @classmethod
    def create(cls, path: str, budget_bytes: int, name: str) -> Ledger:
        """A new ledger for the device ``name``.

        Raises:
            LedgerError: it exists already, cannot be written, or the budget is less than a granule.
        """
        budget = budget_bytes // GRANULE_BYTES
        if budget < 1:
            raise LedgerError(f"device {name} has a budget of {budget_bytes} bytes; give it at least 2MiB")
        create_file(path, budget)
        return cls.open(path)

    @classmethod
    def open(cls, path: str) -> Ledger:
        """Raises LedgerError if it is missing, of another version, or not private to this user."""
        return cls(LedgerTable(path))

    @staticmethod
    def remove(path: str) -> None:
        """Delete the file, if it is there. Owners that still have it open keep a table that nobody else sees."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    @property
    def path(self) -> str:
        return self._table.path

    @property
    def budget(self) -> int:
        return self._table.budget

    def owners(self) -> list[OwnerView]:
        """All owners at one moment, dead ones that are not reaped included."""
        with self._table.lock:
            return self._table.owners()

    def totals(self) -> Totals:
        with self._table.lock:
            return self._table.totals()

    def join(
        self, name: str, *, floor: int, ceiling: int, priority: int, bell: str, share: float = 1.0
    ) -> Owner:
        """Become an owner, in state ``starting``, busy and holding nothing.

        Raises:
            LedgerError: all slots are taken, or a name is too long.
        """
        if not 0 <= floor <= ceiling:
            raise ValueError(f"floor {floor}, ceiling {ceiling}")
        if share < 0.001:
            raise ValueError(f"share {share}")
        if not name or len(name.encode()) > MAX_NAME_BYTES:
            raise LedgerError(
                f"an owner's name has 1 to {MAX_NAME_BYTES} bytes: {name!r}; use a shorter model name"
            )
        if len(bell.encode()) > MAX_BELL_BYTES:
            raise LedgerError(f"{bell} is longer than {MAX_BELL_BYTES} bytes; use a shorter run_dir")
        with self._table.lock:
            self._reap_empty()
            slot, life = self._free_slot()
            crash_points.crash_point("in_lock")
            self._fill_slot(slot, name, floor, ceiling, priority, round(share * 1000), bell)
            return Owner(self._table, slot, life)

    def reap(self, device_free_granules: int | None) -> int:
        """Take back what dead owners left; returns the granules that are free again.

        ``device_free_granules`` is what the device shows as free now: as long as the memory of the dead is not among
        it, their granules stay ``returning``. All or nothing at first, for what the living have leased and not filled
        shows as free too; when the driver has had its time, what is missing is somebody else's, and the rest is free.
        None trusts that memory dies with its process (the host).
        """
        with self._table.lock:
            now, returned = time.monotonic(), 0
            dead = {(slot, self._table.read(Column.EPOCH, slot)) for slot in self._dead_slots()}
            self._seen_dead = {each: self._seen_dead.get(each, now) for each in sorted(dead)}
            for (slot, _), seen_at in self._seen_dead.items():
                back = held = self._table.held(slot)
                if device_free_granules is not None:
                    back = min(held, max(0, device_free_granules - self._table.free()))
                    if back < held and now - seen_at < DRIVER_RETURNS_S:
                        back = 0
                crash_points.crash_point("in_lock")
                returned += self._table.clear(slot) if back == held else self._table.lower(slot, back)
            return returned

    def close(self) -> None:
        """Owners of this ledger must have left."""
        self._table.close()

    def check(self) -> None:
        with self._table.lock:
            self._table.check()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _dead_slots(self) -> list[int]:
        used = self._table.used_slots()
        alive = self._table.lives.held_of(used)
        return [slot for slot in used if slot not in alive]

    def _reap_empty(self) -> None:
        """Free the slots of dead owners that held nothing: no device needs to be asked about them."""
        for slot in self._dead_slots():
            if not self._table.held(slot):
                self._table.clear(slot)

    def _free_slot(self) -> tuple[int, Life]:
        """A free slot, with its life lock held: whoever sees the slot in use sees its owner alive."""
        used = set(self._table.used_slots())
        for slot in range(NUM_SLOTS):
            if slot in used:
                continue
            life = Life(self.path, FIRST_LIFE_BYTE + slot)
            if life.begin():
                return slot, life
            life.close()
        raise LedgerError(
            f"{self.path}: all {NUM_SLOTS} slots have owners; stop a model, or spread the models over more devices"
        )

    def _fill_slot(
        self, slot: int, name: str, floor: int, ceiling: int, priority: int, thousandths: int, bell: str
    ) -> None:
        table = self._table
        epoch = table.read(Column.EPOCH, slot) + 1
        for column in Column:
            table.write(column, slot, 0)
        table.write(Column.EPOCH, slot, epoch)
        table.write(Column.STATE, slot, STATES.index(RuntimeState.STARTING))
        table.write(Column.PRIORITY, slot, priority)
        table.write(Column.SHARE, slot, thousandths)
        table.write(Column.CEILING, slot, ceiling)
        table.write(Column.FLOOR, slot, floor)
        table.write(Column.BUSY, slot, 1)
        table.write_text(slot, name, bell)
        table.write(Column.PID, slot, os.getpid())
