"""The card's backend: an arena is a reserved range of GPU addresses, mapped page by page with memory of its own.

A page's handle is released as soon as it is mapped: the mapping keeps the memory, and one unmap call a run gives it
back. Costs are per call and page, not per byte (docs/benchmarks.md, grow.py), which is why pages are large;
there is no batching beyond that. Whether a page that is mapped anew holds its former owner's bytes is the
driver's business: ``gives_zeroed_memory`` looks, and an arena fills its pages with zeros where it does not.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Callable, Sequence

from prism_sgl.allocator.arena import MAPPED, STUCK, UNMAPPED, ArenaPages
from prism_sgl.allocator.cuda_calls import CudaCalls, DriverError
from prism_sgl.allocator.vmm import DeviceFullError, address_of
from prism_sgl.errors import VmmError

# Large enough to run at the speed of the link, small enough that the first layers arrive early.
_COPY_BYTES = 128 << 20


class CudaArena(ArenaPages):
    """A ``Vmm`` on GPU memory.

    Invariants: a mapped page may be touched by the card; an unmapped page faults and holds nothing; a stuck page
    (a call failed half-way) is not to be touched and holds memory until ``_free_stuck`` succeeds.
    """

    def __init__(
        self,
        name: str,
        num_pages: int,
        page_bytes: int,
        *,
        device: int = 0,
        zeroed: bool = True,
        calls: CudaCalls | None = None,
    ) -> None:
        """``zeroed``: a newly mapped page reads as zero; else it holds what its last owner left."""
        try:
            self._calls = CudaCalls(device) if calls is None else calls
            unit_bytes = self._calls.granularity()
        except DriverError as error:
            raise VmmError(f"{name}: device {device} does not answer: {error}") from error
        super().__init__(name, num_pages, page_bytes, unit_bytes)
        self._zeroed = zeroed
        # Handles that could not be released, by page: their memory outlives the mapping.
        self._unreleased: dict[int, int] = {}
        # Something is mapped there; differs from _states on stuck pages only.
        self._bound = bytearray(num_pages)
        self._arrivals: list[tuple[int, int]] = []  # (end offset, event) of copies, ascending
        self._arrivals_begin = 0  # bytes below were there before
        # The last arrival's event may not be recorded: it would count as passed, whatever is under way.
        self._unrecorded = False
        self._spare_events: list[int] = []
        # What close does when no page holds memory any more, last first: a step that fails can be done again.
        self._undo: list[Callable[[], None]] = []
        try:
            self._stream = self._calls.new_stream()
            self._undo.append(functools.partial(self._calls.destroy_stream, self._stream))
            self.base = self._calls.reserve(self.size_bytes)
            self._undo.append(functools.partial(self._calls.free_addresses, self.base, self.size_bytes))
        except DriverError as error:
            with contextlib.suppress(VmmError):
                self.close()
            raise VmmError(
                f"{name}: cannot reserve {self.size_bytes} bytes of GPU addresses: {error}"
            ) from error

    def physical_bytes(self) -> int:
        """The driver does not tell it for one range: what our calls have left there."""
        return sum(map(self._holds_memory, range(self.num_pages))) * self.page_bytes

    def map(self, runs: Sequence[range]) -> None:
        merged = self._checked(runs, mapped=False)
        self._free_stuck()
        for run in merged:
            if STUCK in self._states[run.start : run.stop]:
                raise VmmError(f"{self.name}: pages {run} are stuck")
        try:
            for run in merged:
                self._map_run(run)
            if self._zeroed:
                self._calls.synchronize(self._stream)
        except DriverError as error:
            for page in (page for run in merged for page in run):
                if self._holds_memory(page):
                    self._states[page] = STUCK
            self._free_stuck()
            kind = DeviceFullError if error.is_shortage else VmmError
            raise kind(f"{self.name}: cannot map {merged}: {error}") from error
        for run in merged:
            self._mark(run, MAPPED)

    def unmap(self, runs: Sequence[range]) -> None:
        merged = self._checked(runs, mapped=True)
        self.settle()  # a copy into unmapped pages would be the end of the context
        self._free_stuck()
        for run in merged:
            try:
                self._calls.unmap(*self._bytes_of(run))
            except DriverError as error:
                raise VmmError(f"{self.name}: cannot unmap {run}: {error}") from error
            self._bound[run.start : run.stop] = bytes(len(run))
            self._mark(run, UNMAPPED)

    def copy_in(self, offset: int, source: memoryview) -> None:
        self._check_span(offset, source.nbytes)
        if not source.nbytes:
            return
        address = address_of(source)
        if self._unrecorded:
            self.settle()  # that event would no longer be the last
        if not self._arrivals:
            self._arrivals_begin = offset
        try:
            for start in range(0, source.nbytes, _COPY_BYTES):
                size_bytes = min(_COPY_BYTES, source.nbytes - start)
                event = self._spare_events.pop() if self._spare_events else self._new_event()
                # Noted before the copy begins: one that nobody waits for could end in unmapped pages.
                self._arrivals.append((offset + start + size_bytes, event))
                self._calls.copy_in(self.base + offset + start, address + start, size_bytes, self._stream)
                self._calls.record(event, self._stream)
        except DriverError as error:
            self._unrecorded = bool(self._arrivals)
            with contextlib.suppress(VmmError):
                self.settle()
            raise VmmError(f"{self.name}: cannot copy {source.nbytes} bytes in: {error}") from error

    def copy_out(self, offset: int, target: memoryview) -> None:
        self._check_span(offset, target.nbytes)
        if not target.nbytes:
            return
        self.settle()  # copies out do not wait for copies in by themselves
        try:
            self._calls.copy_out(self.base + offset, address_of(target), target.nbytes)
        except DriverError as error:
            raise VmmError(f"{self.name}: cannot copy {target.nbytes} bytes out: {error}") from error

    def settle(self) -> None:
        if not self._arrivals:
            return
        try:
            self._calls.synchronize(self._stream)
        except DriverError as error:
            raise VmmError(f"{self.name}: a copy into it failed: {error}") from error
        self._forget_arrivals()

    def is_settled(self) -> bool:
        if self._arrivals:
            try:
                self._record_last()
                if not self._calls.has_passed(self._arrivals[-1][1]):
                    return False
            except DriverError as error:
                raise VmmError(f"{self.name}: a copy into it failed: {error}") from error
            self._forget_arrivals()
        return True

    def hold_back(self, stream: int, end: int) -> None:
        """Later work on ``stream`` waits on the card until bytes ``[0, end)`` are there. The caller does not wait."""
        if not self._arrivals or end <= self._arrivals_begin:
            return
        index = bisect.bisect_left(self._arrivals, end, key=lambda arrival: arrival[0])
        try:
            self._record_last()
            self._calls.make_wait(stream, self._arrivals[min(index, len(self._arrivals) - 1)][1])
        except DriverError as error:
            raise VmmError(f"{self.name}: cannot hold a stream back: {error}") from error

    def close(self) -> None:
        """When it fails, it may be called again for the rest."""
        self._is_open = False
        self.settle()
        for page in range(self.num_pages):
            if self._states[page] == MAPPED:
                self._states[page] = STUCK
        self._free_stuck()
        if STUCK in self._states:
            raise VmmError(f"{self.name}: {self.held_bytes} bytes cannot be unmapped")
        try:
            while self._undo:
                self._undo[-1]()
                self._undo.pop()
        except DriverError as error:
            raise VmmError(f"{self.name}: cannot release its addresses: {error}") from error

    def check(self) -> None:
        assert all(state in (UNMAPPED, MAPPED, STUCK) for state in self._states)
        for page, state in enumerate(self._states):
            assert self._holds_memory(page) is (state != UNMAPPED), page
            if state == MAPPED:
                assert self._bound[page] and page not in self._unreleased, page
        assert self.physical_bytes() == self.held_bytes
        assert self._arrivals or not self._unrecorded
        ends = [end for end, _ in self._arrivals]
        assert ends == sorted(ends)

    def _map_run(self, run: range) -> None:
        for page in run:
            handle = self._calls.create(self.page_bytes)
            # Noted before anything can fail: memory that nobody knows of would be lost for good.
            self._unreleased[page] = handle
            self._calls.map(self.base + page * self.page_bytes, self.page_bytes, handle)
            self._bound[page] = True
            self._calls.release(handle)
            del self._unreleased[page]
            # A call for the run would cost as much as one a page; so the card fills while we map on.
            self._calls.allow_access(self.base + page * self.page_bytes, self.page_bytes)
            if self._zeroed:
                self._calls.fill(self.base + page * self.page_bytes, 0, self.page_bytes, self._stream)

    def _free_stuck(self) -> None:
        """Try again to free what failed calls have left behind. Failing again changes nothing."""
        if STUCK not in self._states:
            return
        try:
            self._calls.synchronize(self._stream)  # the card may be about to fill them with zeros
        except DriverError:
            return
        for page in range(self.num_pages):
            if self._states[page] != STUCK:
                continue
            try:
                if self._bound[page]:
                    self._calls.unmap(*self._bytes_of(range(page, page + 1)))
                    self._bound[page] = False
                if page in self._unreleased:
                    self._calls.release(self._unreleased[page])
                    del self._unreleased[page]
            except DriverError:
                continue  # still stuck, and counted as held
            self._states[page] = UNMAPPED

    def _holds_memory(self, page: int) -> bool:
        return bool(self._bound[page]) or page in self._unreleased

    def _new_event(self) -> int:
        event = self._calls.new_event()
        self._undo.append(functools.partial(self._calls.destroy_event, event))
        return event

    def _record_last(self) -> None:
        """What a failed ``copy_in`` left to be done: behind every copy that has begun, which is later than need be."""
        if self._unrecorded:
            self._calls.record(self._arrivals[-1][1], self._stream)
            self._unrecorded = False

    def _forget_arrivals(self) -> None:
        self._unrecorded = False
        self._spare_events += [event for _, event in self._arrivals]
        self._arrivals.clear()

    def _bytes_of(self, run: range) -> tuple[int, int]:
        """(address, size)"""
        offset, size_bytes = self._span_of(run)
        return self.base + offset, size_bytes


def page_lock(calls: CudaCalls, source: memoryview) -> Callable[[], None]:
    """Fix these host bytes in place; returns what undoes it, to be called after the last copy.

    Copies to and from other memory run at a fraction of the link and block the caller.

    Raises:
        VmmError: the system refuses. Copies still work.
    """
    address = address_of(source)
    try:
        calls.page_lock(address, source.nbytes, read_only=source.readonly)
    except DriverError as error:
        raise VmmError(f"cannot page-lock {source.nbytes} bytes: {error}") from error
    return functools.partial(calls.page_unlock, address)


def gives_zeroed_memory(calls: CudaCalls, page_bytes: int) -> bool:
    """The driver scrubs memory before it is given out again, as far as one look tells.

    Driver 580 does: 60 GiB filled and given back read as zero afterwards, in the same process and in others
    (docs/design.md). Where it does not, what was just given back most likely comes back as it was.
    """
    probe = CudaArena("probe", 1, page_bytes, zeroed=False, calls=calls)
    seen = bytearray(page_bytes)
    try:
        probe.map([range(1)])
        probe.copy_in(0, memoryview(b"\xa5" * page_bytes))
        probe.unmap([range(1)])
        probe.map([range(1)])
        probe.copy_out(0, memoryview(seen))
    finally:
        probe.close()
    return not any(seen)
