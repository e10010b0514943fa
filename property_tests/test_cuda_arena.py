"""The card's arena on a model of the driver whose calls fail and whose copies are late, against ``{page: bytes}``.

After every step, failed or not, the arena holds what the driver says that it holds, and each mapped page has the
bytes that were written there last, or zeros if none were.
"""

from __future__ import annotations

from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from prism_sgl.allocator import vmm_cuda
from prism_sgl.allocator.vmm import DeviceFullError
from prism_sgl.allocator.vmm_cuda import CudaArena
from prism_sgl.errors import VmmError
from tests.allocator.fake_driver import BROKEN, SHORTAGE, FakeDriver

UNIT_BYTES = 256
PAGE_BYTES = 2 * UNIT_BYTES
NUM_PAGES = 6
CAPACITY = 5  # pages: one less than the arena has
CALLS = ["create", "map", "allow_access", "unmap", "release", "fill", "record", "synchronize", "copy_in",
         "new_event", "has_passed"]  # fmt: skip
page_sets = st.sets(st.integers(0, NUM_PAGES - 1), min_size=1)


class CudaArenaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = mock.patch.object(vmm_cuda, "_COPY_BYTES", UNIT_BYTES)  # two copies a page
        self.patch.start()
        self.card = FakeDriver(capacity_bytes=CAPACITY * PAGE_BYTES, unit_bytes=UNIT_BYTES, scrubs=False)
        self.arena = CudaArena("test", NUM_PAGES, PAGE_BYTES, calls=self.card)
        self.forward = self.card.new_stream()
        self.model: dict[int, bytes] = {}
        self.on_its_way: set[int] = set()
        self.written = 0
        self.steps_to_repair = 0

    def teardown(self) -> None:
        self.card.repair()
        self.arena.settle()
        self.card.advance(self.forward)
        self.card.destroy_stream(self.forward)
        self.arena.close()
        self.card.insist_empty()
        self.patch.stop()

    # -- the driver

    @rule(calls=st.integers(0, 12), shortage=st.booleans())
    def fail_at(self, calls: int, shortage: bool) -> None:
        self.card.fail_after, self.card.error = calls, SHORTAGE if shortage else BROKEN
        self.steps_to_repair = 3

    @rule(names=st.sets(st.sampled_from(CALLS), min_size=1, max_size=2), steps=st.integers(1, 3))
    def break_calls(self, names: set[str], steps: int) -> None:
        self.card.broken |= names
        self.steps_to_repair = steps + 1

    @rule(num_works=st.integers(1, 8))
    def advance(self, num_works: int) -> None:
        self.card.advance(self.arena._stream, num_works)
        self.look()

    # -- the arena

    @rule(pages=page_sets)
    def map(self, pages: set[int]) -> None:
        pages -= self.model.keys()
        may_fail = self.may_fail()
        has_room = len(self.model) + len(pages) <= CAPACITY
        try:
            self.arena.map(_runs(pages))
        except DeviceFullError:
            assert may_fail or not has_room
            return
        except VmmError:
            assert may_fail
            return
        assert has_room
        self.model.update(dict.fromkeys(pages, bytes(PAGE_BYTES)))

    @rule(pages=page_sets)
    def unmap(self, pages: set[int]) -> None:
        pages &= self.model.keys()
        may_fail = self.may_fail()
        try:
            self.arena.unmap(_runs(pages))
        except VmmError:
            assert may_fail
            pages = {page for page in pages if not self.arena.is_mapped(page)}
        else:
            self.on_its_way.clear()
        for page in pages:
            del self.model[page]

    @rule(pages=page_sets)
    def copy_in(self, pages: set[int]) -> None:
        pages &= self.model.keys()
        if pages and not self.ascends(pages):
            self.settle()
        for page in sorted(pages) if pages and self.ascends(pages) else ():
            if not self.copy_page_in(page):
                return

    def ascends(self, pages: set[int]) -> bool:
        """As copies must as long as some are under way."""
        return min(pages) > max(self.on_its_way, default=-1)

    def copy_page_in(self, page: int) -> bool:
        self.written += 1
        data = b"".join(self.written.to_bytes(2, "little") for _ in range(PAGE_BYTES // 2))
        may_fail = self.may_fail()
        self.on_its_way.add(page)
        try:
            self.arena.copy_in(page * PAGE_BYTES, memoryview(data))
        except VmmError:
            assert may_fail
            self.card.advance(self.arena._stream)
            self.model[page] = self.there(page)  # a part of it may have come
            return False
        self.model[page] = data
        return True

    @rule()
    def settle(self) -> None:
        may_fail = self.may_fail()
        try:
            self.arena.settle()
        except VmmError:
            assert may_fail
        else:
            self.on_its_way.clear()

    def look(self) -> None:
        may_fail = self.may_fail()
        try:
            is_settled = self.arena.is_settled()
        except VmmError:
            assert may_fail
            return
        assert is_settled or self.on_its_way
        if is_settled:
            assert not self.card.copies_under_way()
            self.on_its_way.clear()

    @rule(page=st.integers(0, NUM_PAGES - 1))
    def forward_pass(self, page: int) -> None:
        """It reads the mapped pages up to this one, and is held back until they are there."""
        expected = {p: data for p, data in self.model.items() if p <= page}

        def read() -> None:
            assert {p: self.there(p) for p in expected} == expected

        may_fail = self.may_fail()
        try:
            self.arena.hold_back(self.forward, (page + 1) * PAGE_BYTES)
        except VmmError:
            assert may_fail
            return
        self.card.launch(self.forward, read)
        self.card.advance(self.forward)  # an unmap would have to wait for it

    # -- what must be true after each

    @invariant()
    def agrees(self) -> None:
        self.arena.check()
        assert self.arena.held_bytes == self.arena.physical_bytes() == self.card.held_bytes
        assert {page for page in range(NUM_PAGES) if self.arena.is_mapped(page)} == self.model.keys()
        for page, data in self.model.items():
            if page not in self.on_its_way:
                assert self.there(page) == data
        self.card.made.clear()
        self.steps_to_repair -= 1  # else hardly anything would ever work
        if self.steps_to_repair <= 0:
            self.card.repair()

    def may_fail(self) -> bool:
        return bool(self.card.broken) or self.card.fail_after is not None

    def there(self, page: int) -> bytes:
        return self.card.read(self.arena.base + page * PAGE_BYTES, PAGE_BYTES)


def _runs(pages: set[int]) -> list[range]:
    return [range(page, page + 1) for page in sorted(pages, key=lambda p: (p % 2, -p))]


TestCudaArena = CudaArenaMachine.TestCase
TestCudaArena.settings = settings(max_examples=120, stateful_step_count=30, deadline=None, derandomize=True)
