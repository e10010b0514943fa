"""The ledger's file: where each number stands, and how it is read. Who may write what: owner.py and ledger.py.

All numbers are aligned 8-byte words, so each is written whole or not at all, also by a process that is killed.
Nothing is stored that could be computed: totals are sums over the slots, so no crash can make them untrue.
The words of one column lie side by side, which makes a sum over all owners one read.
"""

from __future__ import annotations

import enum
import mmap
import os
import stat
import struct
import sys

from prism_sgl.allocator.ledger_lock import FileLock, LifeLocks
from prism_sgl.allocator.ledger_views import Kind, OwnerView, Target, Totals
from prism_sgl.errors import LedgerError
from prism_sgl.messages import RuntimeState

NUM_SLOTS = 64
MAX_NAME_BYTES = 64
MAX_BELL_BYTES = 107  # sun_path without its final zero
_BELL_BYTES = 112
MAGIC = int.from_bytes(b"prismldg", sys.byteorder)
VERSION = 3
STATES = tuple(RuntimeState)  # stored as an index; new states come last


class Header(enum.IntEnum):
    MAGIC = 0  # written last: a file without it is not complete
    VERSION = 1
    NUM_SLOTS = 2
    BUDGET = 3
    NUM_WORDS = 16


class Column(enum.IntEnum):
    """One word a slot. The owner writes it; TARGET* are the requesters', under the lock."""

    WEIGHTS = 0  # held; in the order of Kind
    KV = 1
    OVERHEAD = 2
    ASKED = 3  # granules that it has asked its neighbours for and not got
    ASKED_AT = 4
    ASKED_UNTIL = 5
    PID = 6  # 0: the slot is free; written last by join, and last by reap
    EPOCH = 7  # how often the slot was joined: tells an owner from the one before it
    STATE = 8
    PRIORITY = 9
    SHARE = 10  # thousandths
    FLOOR = 11
    CEILING = 12
    BUSY = 13
    WANTED = 14
    IDLE_SINCE = 15
    ANSWERED_SEQ = 16
    TARGET = 17
    TARGET_DEADLINE = 18
    TARGET_ENFORCED = 19
    TARGET_SEQ = 20  # written after the three above


_NAMES_AT = (Header.NUM_WORDS + len(Column) * NUM_SLOTS) * 8
_BELLS_AT = _NAMES_AT + NUM_SLOTS * MAX_NAME_BYTES
FILE_BYTES = _BELLS_AT + NUM_SLOTS * _BELL_BYTES
LOCK_BYTE = 0
FIRST_LIFE_BYTE = 1

_HELD = struct.Struct(f"{len(Kind) * NUM_SLOTS}q")
_HELD_AT = (Header.NUM_WORDS + Column.WEIGHTS * NUM_SLOTS) * 8
_ALL = struct.Struct(f"{len(Column) * NUM_SLOTS}q")
_COLUMN = struct.Struct(f"{NUM_SLOTS}q")


class LedgerTable:
    """One process's view of the file. Readers of several words hold ``lock`` unless they say otherwise."""

    def __init__(self, path: str) -> None:
        self.path = path
        # A map of its own open file, see ledger_lock.py.
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise LedgerError(
                f"{path}: {error.strerror}; start `python -m prism_sgl.launch` first"
            ) from error
        try:
            _check_file(path, fd)
            self._map = mmap.mmap(fd, FILE_BYTES)
        finally:
            os.close(fd)
        self.words = memoryview(self._map).cast("q")
        _check_header(path, self.words)
        self.budget = self.words[Header.BUDGET]
        self.lock = FileLock(path, LOCK_BYTE)
        self.lives = LifeLocks(self.lock, FIRST_LIFE_BYTE, NUM_SLOTS)

    def close(self) -> None:
        self.lock.close()
        self.words.release()
        self._map.close()

    def read(self, column: Column, slot: int) -> int:
        """One word; needs no lock."""
        return self.words[Header.NUM_WORDS + column * NUM_SLOTS + slot]

    def write(self, column: Column, slot: int, value: int) -> None:
        self.words[Header.NUM_WORDS + column * NUM_SLOTS + slot] = value

    def column(self, column: Column) -> tuple[int, ...]:
        return _COLUMN.unpack_from(self._map, (Header.NUM_WORDS + column * NUM_SLOTS) * 8)

    def text(self, slot: int) -> tuple[str, str]:
        """(name, path of the doorbell)"""
        return self._text(_NAMES_AT, MAX_NAME_BYTES, slot), self._text(_BELLS_AT, _BELL_BYTES, slot)

    def write_text(self, slot: int, name: str, bell: str) -> None:
        for start, size, value in ((_NAMES_AT, MAX_NAME_BYTES, name), (_BELLS_AT, _BELL_BYTES, bell)):
            at = start + slot * size
            self._map[at : at + size] = value.encode().ljust(size, b"\0")

    def held(self, slot: int) -> int:
        return sum(self.read(Column(kind), slot) for kind in Kind)

    def free(self) -> int:
        """What may be reserved. Dead owners count as holders until they are reaped, so no test of life is needed."""
        held: int = sum(_HELD.unpack_from(self._map, _HELD_AT))
        return self.budget - held

    def used_slots(self) -> list[int]:
        return [slot for slot, pid in enumerate(self.column(Column.PID)) if pid]

    def totals(self) -> Totals:
        held = self._held_by_slot()
        used = self.used_slots()
        alive = self.lives.held_of(used)
        leased = sum(held[slot] for slot in alive)
        returning = sum(held[slot] for slot in used if slot not in alive)
        return Totals(self.budget, leased, returning, self.budget - leased - returning)

    def owners(self) -> list[OwnerView]:
        words = self._all_words()
        used = self.used_slots()
        alive = self.lives.held_of(used)
        return [self._view(slot, words, slot in alive) for slot in used]

    def owner(self, slot: int) -> OwnerView:
        return self._view(slot, self._all_words(), self.lives.is_held(slot))

    def _all_words(self) -> tuple[int, ...]:
        return _ALL.unpack_from(self._map, Header.NUM_WORDS * 8)

    def _held_by_slot(self) -> list[int]:
        held = _HELD.unpack_from(self._map, _HELD_AT)
        columns = [held[kind * NUM_SLOTS : (kind + 1) * NUM_SLOTS] for kind in Kind]
        return [sum(of_slot) for of_slot in zip(*columns, strict=True)]

    def _view(self, slot: int, words: tuple[int, ...], alive: bool) -> OwnerView:
        of_slot = words[slot::NUM_SLOTS]  # indexed by Column
        name, bell = self.text(slot)
        target = None
        if of_slot[Column.TARGET_SEQ] != of_slot[Column.ANSWERED_SEQ]:
            target = Target(
                of_slot[Column.TARGET],
                of_slot[Column.TARGET_SEQ],
                of_slot[Column.TARGET_DEADLINE],
                of_slot[Column.TARGET_ENFORCED],
            )
        return OwnerView(
            slot=slot,
            epoch=of_slot[Column.EPOCH],
            pid=of_slot[Column.PID],
            name=name,
            bell=bell,
            alive=alive,
            state=STATES[of_slot[Column.STATE]],
            priority=of_slot[Column.PRIORITY],
            share=of_slot[Column.SHARE],
            weights=of_slot[Column.WEIGHTS],
            kv=of_slot[Column.KV],
            overhead=of_slot[Column.OVERHEAD],
            floor=of_slot[Column.FLOOR],
            ceiling=of_slot[Column.CEILING],
            busy=bool(of_slot[Column.BUSY]),
            wanted=of_slot[Column.WANTED],
            idle_since_ns=of_slot[Column.IDLE_SINCE],
            target=target,
            answered_seq=of_slot[Column.ANSWERED_SEQ],
        )

    def target(self, slot: int) -> Target | None:
        """The target that is not answered yet. Needs no lock: TARGET_SEQ is written last and looked at twice."""
        seq = self.read(Column.TARGET_SEQ, slot)
        while seq != self.read(Column.ANSWERED_SEQ, slot):
            granules = self.read(Column.TARGET, slot)
            deadline_ns = self.read(Column.TARGET_DEADLINE, slot)
            enforced = self.read(Column.TARGET_ENFORCED, slot)
            again = self.read(Column.TARGET_SEQ, slot)
            if again == seq:
                return Target(granules, seq, deadline_ns, enforced)
            seq = again
        return None

    def write_target(self, slot: int, granules: int, enforced: int, deadline_ns: int) -> Target:
        """Set the target, never below what the owner may keep. Under the lock."""
        kept = 0 if self.is_asleep(slot) else self.read(Column.FLOOR, slot)
        granules, enforced = max(granules, kept), max(enforced, kept)
        seq = self.read(Column.TARGET_SEQ, slot) + 1
        self.write(Column.TARGET, slot, granules)
        self.write(Column.TARGET_DEADLINE, slot, deadline_ns)
        self.write(Column.TARGET_ENFORCED, slot, enforced)
        self.write(Column.TARGET_SEQ, slot, seq)
        return Target(granules, seq, deadline_ns, enforced)

    def is_asleep(self, slot: int) -> bool:
        return STATES[self.read(Column.STATE, slot)] is RuntimeState.ASLEEP

    def elastic(self, slot: int) -> int:
        """See ``OwnerView.elastic``."""
        weights = self.read(Column.WEIGHTS, slot) if self.is_asleep(slot) else 0
        return self.read(Column.KV, slot) + weights

    def answer_targets(self, slot: int) -> None:
        """Whatever was asked of it is settled. Under the lock."""
        self.write(Column.ANSWERED_SEQ, slot, self.read(Column.TARGET_SEQ, slot))

    def clear(self, slot: int) -> int:
        """Free a slot; returns the granules it held. A process killed half-way leaves the rest to the next one."""
        granules = self.held(slot)
        for kind in Kind:
            self.write(Column(kind), slot, 0)
        self.write(Column.PID, slot, 0)
        return granules

    def lower(self, slot: int, granules: int) -> int:
        """A dead owner holds so much less, of whatever kind; returns it."""
        missing = granules
        for kind in Kind:
            held = self.read(Column(kind), slot)
            self.write(Column(kind), slot, held - min(held, missing))
            missing -= min(held, missing)
        return granules

    def check(self) -> None:
        _check_header(self.path, self.words)
        assert self.words[Header.BUDGET] == self.budget
        assert self.free() >= 0, f"{-self.free()} granules over the budget"
        pids = self.column(Column.PID)
        for slot, pid in enumerate(pids):
            assert pid >= 0
            assert all(self.read(Column(kind), slot) >= 0 for kind in Kind), slot
            assert pid or not self.held(slot), f"free slot {slot} holds {self.held(slot)}"
            if not pid:
                continue
            view = self.owner(slot)
            assert 0 <= view.floor <= view.ceiling, (view.name, view.floor, view.ceiling)
            assert self.read(Column.ANSWERED_SEQ, slot) <= self.read(Column.TARGET_SEQ, slot)
            if view.target is not None and view.alive:
                assert view.target.granules >= view.kept, (view.name, view.target, view.kept)
                assert view.target.enforced >= view.target.granules, (view.name, view.target)

    def _text(self, start: int, size: int, slot: int) -> str:
        at = start + slot * size
        return self._map[at : at + size].rstrip(b"\0").decode(errors="replace")


def create_file(path: str, budget_granules: int) -> None:
    """A complete ledger with no owners.

    Raises:
        LedgerError: the file exists already, or there is no room for it.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}; another instance may be running") from error
    try:
        os.posix_fallocate(fd, 0, FILE_BYTES)  # a hole could be a SIGBUS in whoever writes there first
        with mmap.mmap(fd, FILE_BYTES) as shared, memoryview(shared).cast("q") as words:
            words[Header.VERSION] = VERSION
            words[Header.NUM_SLOTS] = NUM_SLOTS
            words[Header.BUDGET] = budget_granules
            words[Header.MAGIC] = MAGIC
    except OSError as error:
        os.unlink(path)
        raise LedgerError(f"{path}: {error.strerror}; free some space there") from error
    finally:
        os.close(fd)


def _check_file(path: str, fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise LedgerError(f"{path} is not private to this user; remove it and start again")
    if status.st_size != FILE_BYTES:
        raise LedgerError(
            f"{path} has {status.st_size} bytes, not {FILE_BYTES}: it is no ledger of version {VERSION}"
        )


def _check_header(path: str, words: memoryview) -> None:
    if words[Header.MAGIC] != MAGIC:
        raise LedgerError(f"{path} is no ledger; remove it and start again")
    if (words[Header.VERSION], words[Header.NUM_SLOTS]) != (VERSION, NUM_SLOTS):
        raise LedgerError(
            f"{path} is of version {words[Header.VERSION]} with {words[Header.NUM_SLOTS]} slots, this is version "
            f"{VERSION} with {NUM_SLOTS}; stop the other version of prism_sgl first"
        )
    if words[Header.BUDGET] <= 0:
        raise LedgerError(f"{path} has no budget; remove it and start again")
