"""A card without a card: the driver calls of ``CudaCalls`` on a strict model of what the driver does.

Memory is real bytes. Streams are queues that run only when somebody waits for them, or when the test calls
``advance``, so data arrives as late as it may. What would be undefined or fatal on a card fails an assertion here.
One call may fail, the n-th from now or every one of a kind; a call that fails has done nothing.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver

from prism_sgl.allocator.cuda_calls import CudaCalls, DriverError

SHORTAGE = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
BROKEN = driver.CUresult.CUDA_ERROR_OPERATING_SYSTEM
_REGISTERED = driver.CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
_FIRST_ADDRESS = 0x7000_0000_0000


@dataclass(eq=False)
class _Memory:
    data: bytearray
    owned: bool = True  # its handle is not released
    mapped: int = 0  # times

    @property
    def is_held(self) -> bool:
        return self.owned or self.mapped > 0


@dataclass(eq=False)
class _Mapping:
    size_bytes: int
    memory: _Memory
    accessible: bool = False


@dataclass(eq=False)
class _Work:
    """One entry of a stream. ``target`` and ``source``: the device and host bytes that it touches."""

    run: Callable[[], None] = lambda: None
    target: range = range(0)
    source: range = range(0)
    waits_for: _Work | None = None
    done: bool = False


@dataclass(eq=False)
class _Event:
    last: _Work | None = None  # where it was recorded last; None: nowhere, which counts as passed


@dataclass(eq=False)
class FakeDriver(CudaCalls):
    """``fail_after``: so many calls succeed, then one fails with ``error``. ``broken``: these names always fail.

    ``scrubs``: memory is given out again as zeros; else as it was left, the last returned first.
    """

    capacity_bytes: int = 1 << 40
    unit_bytes: int = 4096
    scrubs: bool = True
    fail_after: int | None = None
    broken: set[str] = field(default_factory=set)
    error: Any = BROKEN
    made: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._ranges: dict[int, int] = {}  # address -> size
        self._mappings: dict[int, _Mapping] = {}
        self._memories: dict[int, _Memory] = {}
        self._left: list[bytearray] = []
        self._streams: dict[int, deque[_Work]] = {}
        self._events: dict[int, _Event] = {}
        self._next_address = _FIRST_ADDRESS
        self.page_locked: dict[int, tuple[int, bool]] = {}  # address -> (size, read-only)

    # ---------------------------------------------------------------- what tests ask and do

    @property
    def held_bytes(self) -> int:
        return sum(len(memory.data) for memory in self._memories.values())

    def read(self, address: int, size_bytes: int) -> bytes:
        return b"".join(bytes(part) for part in self._parts(address, size_bytes))

    def write(self, address: int, data: bytes) -> None:
        at = 0
        for part in self._parts(address, len(data)):
            part[:] = data[at : at + len(part)]
            at += len(part)

    def launch(self, stream: int, kernel: Callable[[], None]) -> None:
        """Work of others, such as a forward pass."""
        self._streams[stream].append(_Work(kernel))

    def advance(self, stream: int, num_works: int | None = None) -> None:
        """The card goes on by this much of the stream's work (None: all), and by what that waits for."""
        works = self._streams[stream]
        for _ in range(len(works) if num_works is None else min(num_works, len(works))):
            self._run_first(works)

    def copies_under_way(self) -> int:
        return sum(1 for works in self._streams.values() for work in works if len(work.target))

    def repair(self) -> None:
        self.fail_after = None
        self.broken.clear()

    def insist_empty(self) -> None:
        """All that was ever made has been given back."""
        assert not self._ranges, "addresses leaked"
        assert not self._mappings and not self._memories, "memory leaked"
        assert not self._streams, "streams leaked"
        assert not self._events, "events leaked"
        assert not self.page_locked, "host memory is still page-locked"

    # ---------------------------------------------------------------- memory

    def granularity(self) -> int:
        self._enter("granularity")
        return self.unit_bytes

    def reserve(self, size_bytes: int) -> int:
        self._enter("reserve")
        assert size_bytes > 0 and size_bytes % self.unit_bytes == 0
        address = self._next_address
        self._ranges[address] = size_bytes
        self._next_address += size_bytes + self.unit_bytes  # ranges never touch
        return address

    def create(self, size_bytes: int) -> int:
        self._enter("create")
        assert size_bytes > 0 and size_bytes % self.unit_bytes == 0
        if self.held_bytes + size_bytes > self.capacity_bytes:
            raise DriverError("create", SHORTAGE)
        handle = next(self._numbers)
        self._memories[handle] = _Memory(self._fresh_bytes(size_bytes))
        return handle

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        self._enter("map")
        memory = self._memories[handle]
        assert memory.owned, "the handle was released"
        assert size_bytes == len(memory.data)
        assert any(
            base <= address and address + size_bytes <= base + size for base, size in self._ranges.items()
        ), "not reserved"
        assert not self._mappings_in(address, size_bytes), "mapped already"
        self._mappings[address] = _Mapping(size_bytes, memory)
        memory.mapped += 1

    def allow_access(self, address: int, size_bytes: int) -> None:
        self._enter("allow_access")
        for mapping in self._whole_mappings(address, size_bytes).values():
            mapping.accessible = True

    def unmap(self, address: int, size_bytes: int) -> None:
        self._enter("unmap")
        self._insist_untouched(range(address, address + size_bytes))
        for at in self._whole_mappings(address, size_bytes):
            self._mappings.pop(at).memory.mapped -= 1
        self._collect()

    def release(self, handle: int) -> None:
        self._enter("release")
        assert self._memories[handle].owned, "released twice"
        self._memories[handle].owned = False
        self._collect()

    def free_addresses(self, address: int, size_bytes: int) -> None:
        self._enter("free_addresses")
        assert self._ranges.get(address) == size_bytes, "not a whole reservation"
        assert not self._mappings_in(address, size_bytes), "something is mapped there"
        del self._ranges[address]

    # ---------------------------------------------------------------- streams and events

    def new_stream(self) -> int:
        self._enter("new_stream")
        stream = next(self._numbers)
        self._streams[stream] = deque()
        return stream

    def synchronize(self, stream: int) -> None:
        assert stream in self._streams, "no such stream"
        self._enter("synchronize")
        self.advance(stream)

    def destroy_stream(self, stream: int) -> None:
        self._enter("destroy_stream")
        assert not self._streams[stream], "work is queued there"
        del self._streams[stream]

    def new_event(self) -> int:
        self._enter("new_event")
        event = next(self._numbers)
        self._events[event] = _Event()
        return event

    def record(self, event: int, stream: int) -> None:
        self._enter("record")
        work = _Work()
        self._events[event].last = work
        self._streams[stream].append(work)

    def has_passed(self, event: int) -> bool:
        self._enter("has_passed")
        last = self._events[event].last
        return last is None or last.done

    def make_wait(self, stream: int, event: int) -> None:
        self._enter("make_wait")
        self._streams[stream].append(_Work(waits_for=self._events[event].last))

    def destroy_event(self, event: int) -> None:
        self._enter("destroy_event")
        last = self._events.pop(event).last
        assert last is None or last.done, "the event is still to come"

    # ---------------------------------------------------------------- copies

    def fill(self, address: int, byte: int, size_bytes: int, stream: int) -> None:
        self._enter("fill")
        self._queue_write(stream, address, size_bytes, lambda: bytes([byte]) * size_bytes, range(0))

    def copy_in(self, address: int, source: int, size_bytes: int, stream: int) -> None:
        """Page-locked bytes are read when the copy runs, others before this returns."""
        self._enter("copy_in")
        host = range(source, source + size_bytes)
        if self._is_page_locked(host):
            self._queue_write(stream, address, size_bytes, lambda: ctypes.string_at(source, size_bytes), host)
        else:
            data = ctypes.string_at(source, size_bytes)
            self._queue_write(stream, address, size_bytes, lambda: data, range(0))

    def copy_out(self, address: int, target: int, size_bytes: int) -> None:
        self._enter("copy_out")
        assert size_bytes > 0
        self._insist_untouched(range(address, address + size_bytes))
        ctypes.memmove(target, self.read(address, size_bytes), size_bytes)

    def limit_stack(self, size_bytes: int) -> None:
        self._enter("limit_stack")

    def page_lock(self, address: int, size_bytes: int, *, read_only: bool) -> None:
        self._enter("page_lock")
        host = range(address, address + size_bytes)
        if any(_overlap(host, range(at, at + size)) for at, (size, _) in self.page_locked.items()):
            raise DriverError("page_lock", _REGISTERED)
        self.page_locked[address] = (size_bytes, read_only)

    def page_unlock(self, address: int) -> None:
        self._enter("page_unlock")
        size_bytes, _ = self.page_locked[address]
        host = range(address, address + size_bytes)
        for works in self._streams.values():
            assert not any(_overlap(work.source, host) for work in works), "a copy reads it"
        del self.page_locked[address]

    # ---------------------------------------------------------------- within

    def _enter(self, name: str) -> None:
        self.made.append(name)
        fails = name in self.broken
        if self.fail_after is not None:
            fails = fails or self.fail_after == 0
            self.fail_after = None if self.fail_after == 0 else self.fail_after - 1
        if fails:
            raise DriverError(name, self.error)

    def _fresh_bytes(self, size_bytes: int) -> bytearray:
        if not self.scrubs:
            for index in reversed(range(len(self._left))):
                if len(self._left[index]) == size_bytes:
                    return self._left.pop(index)
        return bytearray(size_bytes)

    def _collect(self) -> None:
        for handle, memory in list(self._memories.items()):
            if not memory.is_held:
                del self._memories[handle]
                self._left.append(memory.data)

    def _mappings_in(self, address: int, size_bytes: int) -> dict[int, _Mapping]:
        """All that lie there, in whole or in part, ascending."""
        asked = range(address, address + size_bytes)
        return {
            at: mapping
            for at, mapping in sorted(self._mappings.items())
            if _overlap(asked, range(at, at + mapping.size_bytes))
        }

    def _whole_mappings(self, address: int, size_bytes: int) -> dict[int, _Mapping]:
        found = self._mappings_in(address, size_bytes)
        expected = address
        for at, mapping in found.items():
            assert at == expected, "a part of a mapping, or a gap between mappings"
            expected += mapping.size_bytes
        assert expected == address + size_bytes, "not mapped up to its end"
        return found

    def _parts(self, address: int, size_bytes: int) -> list[memoryview]:
        """The bytes there, a piece each mapping; every one must be mapped and accessible."""
        end, parts = address + size_bytes, []
        for at, mapping in self._mappings_in(address, size_bytes).items():
            assert at <= address, "not mapped"
            assert mapping.accessible, "no access was given"
            stop = min(end, at + mapping.size_bytes)
            parts.append(memoryview(mapping.memory.data)[address - at : stop - at])
            address = stop
        assert address == end, "not mapped"
        return parts

    def _queue_write(
        self, stream: int, address: int, size_bytes: int, data: Callable[[], bytes], source: range
    ) -> None:
        self._parts(address, size_bytes)  # the driver looks at once
        work = _Work(
            lambda: self.write(address, data()), target=range(address, address + size_bytes), source=source
        )
        self._streams[stream].append(work)

    def _run_first(self, works: deque[_Work]) -> None:
        work = works[0]
        if work.waits_for is not None:
            for other in self._streams.values():
                while work.waits_for in other:
                    self._run_first(other)
            assert work.waits_for.done, "waits for ever"
        work.run()
        work.done = True
        works.popleft()

    def _insist_untouched(self, device: range) -> None:
        for works in self._streams.values():
            assert not any(_overlap(work.target, device) for work in works), "a copy is on its way there"

    def _is_page_locked(self, host: range) -> bool:
        return any(at <= host.start and host.stop <= at + size for at, (size, _) in self.page_locked.items())


def _overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)
