"""The card's backend on a model of the driver (fake_driver.py). What any backend does: test_vmm.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest

from prism_sgl.allocator import vmm_cuda
from prism_sgl.allocator.cuda_calls import CudaCalls, DriverError
from prism_sgl.allocator.vmm import DeviceFullError, address_of
from prism_sgl.allocator.vmm_cuda import CudaArena, gives_zeroed_memory, page_lock
from prism_sgl.errors import VmmError
from tests.allocator.backends import FakeCudaBackend, each_failure, read, write
from tests.allocator.fake_driver import BROKEN, SHORTAGE, FakeDriver

PAGE_BYTES = 8192
NUM_PAGES = 8
PIECE_BYTES = 4096  # of a copy, here


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmm_cuda, "_COPY_BYTES", PIECE_BYTES)


@pytest.fixture
def cuda() -> FakeCudaBackend:
    return FakeCudaBackend()


@pytest.fixture
def card(cuda: FakeCudaBackend) -> FakeDriver:
    return cuda.calls


@pytest.fixture
def arena(card: FakeDriver) -> Iterator[CudaArena]:
    arena = CudaArena("test", NUM_PAGES, PAGE_BYTES, calls=card)
    yield arena
    card.repair()
    arena.check()
    arena.close()


@pytest.fixture
def source(card: FakeDriver) -> memoryview:
    """All pages' worth of bytes that tell where they belong."""
    return memoryview(b"".join(bytes([1 + n % 255]) * 256 for n in range(NUM_PAGES * PAGE_BYTES // 256)))


def peek(card: FakeDriver, arena: CudaArena, start: int, end: int) -> bytes:
    """What is there now, whatever is on its way."""
    return card.read(arena.base + start, end - start)


def agrees(card: FakeDriver, arena: CudaArena) -> None:
    arena.check()
    assert arena.held_bytes == arena.physical_bytes() == card.held_bytes


# ---------------------------------------------------------------- the fake itself


def test_the_fake_has_the_signatures_of_the_real_calls() -> None:
    names = {name for name in vars(CudaCalls) if not name.startswith("_")}
    assert names == {name for name in vars(FakeDriver) if name in names}
    for name in names:
        assert inspect.signature(getattr(FakeDriver, name)) == inspect.signature(getattr(CudaCalls, name)), (
            name
        )


@pytest.mark.parametrize(("code", "is_shortage"), [(SHORTAGE, True), (BROKEN, False)])
def test_only_a_lack_of_memory_is_a_shortage(code: object, is_shortage: bool) -> None:
    error = DriverError("cuMemCreate", code)
    assert error.is_shortage is is_shortage
    assert "cuMemCreate: CUDA_ERROR_" in str(error)


# ---------------------------------------------------------------- pages


def test_memory_is_held_by_its_mapping_alone(card: FakeDriver, arena: CudaArena) -> None:
    arena.map([range(3)])
    agrees(card, arena)
    assert card.made.count("create") == card.made.count("release") == 3
    card.made.clear()
    arena.unmap([range(3)])
    agrees(card, arena)
    assert card.held_bytes == 0
    assert card.made == ["unmap"]  # one call a run gives it all back, and nobody waits for an idle stream


def test_pages_of_one_run_and_of_several_may_be_unmapped_together(card: FakeDriver, arena: CudaArena) -> None:
    arena.map([range(2)])
    arena.map([range(2, 4)])
    arena.unmap([range(1, 3)])
    assert [page for page in range(NUM_PAGES) if arena.is_mapped(page)] == [0, 3]
    agrees(card, arena)


def test_pages_are_filled_with_zeros_only_where_asked(card: FakeDriver) -> None:
    seen = []
    for zeroed in (True, False):
        arena = CudaArena("test", 1, PAGE_BYTES, zeroed=zeroed, calls=card)
        arena.map([range(1)])
        write(arena, 0, 9)
        arena.unmap([range(1)])
        arena.map([range(1)])
        assert card.copies_under_way() == 0
        seen.append(read(arena, 0)[:1])
        arena.close()
    assert seen == [b"\0", b"\x09"]
    assert card.made.count("fill") == 2


@pytest.mark.parametrize("scrubs", [True, False])
def test_one_look_tells_whether_the_driver_gives_zeroed_memory(scrubs: bool) -> None:
    card = FakeDriver(scrubs=scrubs)
    assert gives_zeroed_memory(card, PAGE_BYTES) is scrubs
    card.insist_empty()


def test_a_full_card_allows_no_look() -> None:
    card = FakeDriver(capacity_bytes=0)
    with pytest.raises(DeviceFullError):
        gives_zeroed_memory(card, PAGE_BYTES)
    card.insist_empty()


def test_a_full_card_is_a_shortage_and_changes_nothing(card: FakeDriver, arena: CudaArena) -> None:
    card.capacity_bytes = 5 * PAGE_BYTES
    arena.map([range(2)])
    write(arena, 1, 4)
    with pytest.raises(DeviceFullError):
        arena.map([range(3, 5), range(6, 8)])
    assert [page for page in range(NUM_PAGES) if arena.is_mapped(page)] == [0, 1]
    assert read(arena, 1) == b"\4" * PAGE_BYTES
    agrees(card, arena)
    arena.map([range(3, 5), range(6, 7)])
    agrees(card, arena)


def test_pages_are_not_unmapped_while_they_are_being_filled(card: FakeDriver, arena: CudaArena) -> None:
    """The fourth page does not come, and the card may still write zeros to the first three."""
    card.capacity_bytes = 3 * PAGE_BYTES
    with pytest.raises(DeviceFullError):
        arena.map([range(4)])  # the fake asserts
    assert card.held_bytes == 0


@pytest.mark.parametrize("broken", ["unmap", "release", "synchronize"])
@pytest.mark.parametrize("failing", ["map", "allow_access", "fill"])
def test_a_failing_undo_leaves_true_books_until_it_works(
    card: FakeDriver, arena: CudaArena, failing: str, broken: str
) -> None:
    arena.map([range(7, 8)])
    card.broken = {failing, broken}
    with pytest.raises(VmmError):
        arena.map([range(2)])
    assert arena.mapped_bytes == PAGE_BYTES
    agrees(card, arena)
    is_stuck = arena.held_bytes > PAGE_BYTES
    card.broken = {broken}
    if is_stuck:
        with pytest.raises(VmmError, match="stuck"):
            arena.map([range(2)])
        agrees(card, arena)
    card.repair()
    arena.map([range(1, 2)])
    assert read(arena, 1) == bytes(PAGE_BYTES)
    agrees(card, arena)
    assert arena.held_bytes == 2 * PAGE_BYTES


@pytest.mark.parametrize("heal", [lambda a: a.map([]), lambda a: a.unmap([]), lambda a: a.close()])
def test_stuck_pages_come_free_with_the_next_call(
    card: FakeDriver, heal: Callable[[CudaArena], None]
) -> None:
    arena = CudaArena("test", NUM_PAGES, PAGE_BYTES, calls=card)
    card.broken = {"release"}
    with pytest.raises(VmmError):
        arena.map([range(3)])
    assert arena.held_bytes == card.held_bytes == PAGE_BYTES
    card.repair()
    heal(arena)
    agrees(card, arena)
    assert card.held_bytes == 0
    arena.close()
    card.insist_empty()


# ---------------------------------------------------------------- copies


def test_a_copy_is_under_way_until_it_is_waited_for(
    card: FakeDriver, arena: CudaArena, source: memoryview
) -> None:
    arena.map([range(2)])
    arena.copy_in(0, source[: 2 * PAGE_BYTES])
    assert peek(card, arena, 0, 2 * PAGE_BYTES) == bytes(2 * PAGE_BYTES)
    assert not arena.is_settled()
    card.advance(arena._stream, 2)  # a piece and its event
    assert peek(card, arena, 0, 2 * PAGE_BYTES) == bytes(source[:PIECE_BYTES]) + bytes(
        2 * PAGE_BYTES - PIECE_BYTES
    )
    assert not arena.is_settled()
    card.advance(arena._stream)
    assert arena.is_settled()
    assert peek(card, arena, 0, 2 * PAGE_BYTES) == source[: 2 * PAGE_BYTES]
    card.made.clear()
    assert arena.is_settled()
    arena.settle()
    assert card.made == []  # known already


def test_settle_waits(card: FakeDriver, arena: CudaArena, source: memoryview) -> None:
    arena.map([range(1)])
    arena.copy_in(0, source[:PAGE_BYTES])
    arena.settle()
    assert peek(card, arena, 0, PAGE_BYTES) == source[:PAGE_BYTES]
    assert arena.is_settled()


def test_events_are_used_again(card: FakeDriver, arena: CudaArena, source: memoryview) -> None:
    arena.map([range(2)])
    for _ in range(3):
        arena.copy_in(0, source[: 2 * PAGE_BYTES])
        arena.settle()
    assert card.made.count("new_event") == 2 * PAGE_BYTES // PIECE_BYTES


def test_unmap_waits_for_the_copies(card: FakeDriver, arena: CudaArena, source: memoryview) -> None:
    arena.map([range(3)])
    arena.copy_in(0, source[: 3 * PAGE_BYTES])
    arena.unmap([range(2, 3)])  # the fake asserts
    assert peek(card, arena, 0, 2 * PAGE_BYTES) == source[: 2 * PAGE_BYTES]
    arena.check()


@pytest.mark.parametrize(
    ("end", "num_pieces"),
    [
        (0, None),
        (PAGE_BYTES, None),  # was there before
        (PAGE_BYTES + 1, 1),
        (PAGE_BYTES + PIECE_BYTES, 1),
        (PAGE_BYTES + PIECE_BYTES + 1, 2),
        (2 * PAGE_BYTES, 2),
        (4 * PAGE_BYTES, 3),  # lies in a gap: whatever comes next is more than enough
        (5 * PAGE_BYTES + 1, 3),
        (NUM_PAGES * PAGE_BYTES, 4),
        (NUM_PAGES * PAGE_BYTES + 1, 4),
    ],
)
def test_a_stream_is_held_back_until_its_bytes_are_there_and_no_longer(
    card: FakeDriver, arena: CudaArena, source: memoryview, end: int, num_pieces: int | None
) -> None:
    arena.map([range(NUM_PAGES)])
    starts = [PAGE_BYTES, PAGE_BYTES + PIECE_BYTES, 5 * PAGE_BYTES, 6 * PAGE_BYTES]
    arena.copy_in(PAGE_BYTES, source[PAGE_BYTES : 2 * PAGE_BYTES])
    for start in starts[2:]:
        arena.copy_in(start, source[start : start + PIECE_BYTES])
    forward = card.new_stream()
    card.made.clear()
    arena.hold_back(forward, end)
    assert "synchronize" not in card.made  # the caller does not wait
    card.launch(forward, lambda: None)
    card.advance(forward)
    arrived = [
        start for start in starts if peek(card, arena, start, start + PIECE_BYTES) != bytes(PIECE_BYTES)
    ]
    assert arrived == starts[: num_pieces or 0]
    assert not arena.is_settled() or num_pieces == 4
    arena.settle()
    card.destroy_stream(forward)


def test_nothing_is_held_back_when_nothing_is_on_its_way(
    card: FakeDriver, arena: CudaArena, source: memoryview
) -> None:
    forward = card.new_stream()
    arena.hold_back(forward, NUM_PAGES * PAGE_BYTES)
    arena.map([range(1)])
    arena.copy_in(0, source[:PAGE_BYTES])
    arena.settle()
    arena.hold_back(forward, PAGE_BYTES)
    assert "make_wait" not in card.made
    card.destroy_stream(forward)


def test_a_failing_wait_is_an_error_of_the_arena(
    card: FakeDriver, arena: CudaArena, source: memoryview
) -> None:
    arena.map([range(1)])
    arena.copy_in(0, source[:PAGE_BYTES])
    card.broken = {"make_wait", "has_passed", "synchronize"}
    for call in (lambda: arena.hold_back(1, 1), arena.is_settled, arena.settle, arena.close):
        with pytest.raises(VmmError):
            call()
    agrees(card, arena)


def test_each_failing_call_of_a_copy_leaves_nothing_under_way(
    cuda: FakeCudaBackend, arena: CudaArena, source: memoryview
) -> None:
    card = cuda.calls
    arena.map([range(2)])
    for error in each_failure(cuda, lambda: arena.copy_in(0, source[: 2 * PAGE_BYTES])):
        if error is not None:
            assert card.copies_under_way() == 0
            assert arena.is_settled()
        arena.unmap([range(2)])  # the fake asserts that nothing is on its way
        agrees(card, arena)
        arena.map([range(2)])
    for error in each_failure(cuda, lambda: (arena.copy_in(0, source[: 2 * PAGE_BYTES]), arena.settle())):
        assert arena.is_settled() or error is not None
        arena.settle()
        assert card.copies_under_way() == 0
        agrees(card, arena)


@pytest.mark.parametrize("failing", ["copy_in", "record", "new_event"])
def test_a_copy_that_fails_with_its_wait_is_still_waited_for(
    card: FakeDriver, arena: CudaArena, source: memoryview, failing: str
) -> None:
    arena.map([range(1)])
    card.fail_after = {"new_event": 3, "copy_in": 4, "record": 5}[failing]  # of the second piece
    card.broken = {"synchronize"}
    with pytest.raises(VmmError, match=failing):
        arena.copy_in(0, source[:PAGE_BYTES])
    with pytest.raises(VmmError):
        arena.unmap([range(1)])
    assert arena.is_mapped(0)
    card.repair()
    arena.unmap([range(1)])  # the fake asserts
    agrees(card, arena)


@pytest.mark.parametrize("failing", ["copy_in", "record", "new_event"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("looks", [0, 2])
def test_a_copy_that_fails_with_its_wait_is_still_seen_under_way(
    card: FakeDriver, arena: CudaArena, source: memoryview, failing: str, again: bool, looks: int
) -> None:
    """An event that was not recorded counts as passed, for the driver; so does one of an earlier round."""
    arena.map([range(1)])
    if again:
        arena.copy_in(0, source[:PIECE_BYTES])
        arena.settle()
    calls = {"new_event": 3, "copy_in": 4, "record": 5}[failing]  # of the second piece
    card.fail_after = calls - again  # an event is there already
    card.broken = {"synchronize"}
    with pytest.raises(VmmError, match=failing):
        arena.copy_in(0, source[:PAGE_BYTES])
    assert card.copies_under_way() == (2 if failing == "record" else 1)
    assert not any(arena.is_settled() for _ in range(looks))
    forward = card.new_stream()
    arena.hold_back(forward, PAGE_BYTES)
    card.advance(forward)
    assert card.copies_under_way() == 0
    assert arena.is_settled()
    arena.check()
    card.destroy_stream(forward)


def test_where_no_event_can_be_recorded_copies_are_never_taken_as_done(
    card: FakeDriver, arena: CudaArena, source: memoryview
) -> None:
    arena.map([range(1)])
    card.broken = {"record", "synchronize"}
    with pytest.raises(VmmError, match="record"):
        arena.copy_in(0, source[:PIECE_BYTES])
    for call in (
        arena.is_settled,
        lambda: arena.hold_back(1, 1),
        lambda: arena.copy_in(PIECE_BYTES, source[:PIECE_BYTES]),
        arena.settle,
        arena.is_settled,
    ):
        with pytest.raises(VmmError):
            call()
        arena.check()
    assert card.copies_under_way() == 1
    card.repair()
    arena.copy_in(PIECE_BYTES, source[PIECE_BYTES:PAGE_BYTES])
    arena.settle()
    assert peek(card, arena, 0, PAGE_BYTES) == source[:PAGE_BYTES]


# ---------------------------------------------------------------- sources


def test_a_source_is_page_locked_until_it_is_unlocked(card: FakeDriver, source: memoryview) -> None:
    writable = bytearray(PAGE_BYTES)
    locks = [page_lock(card, source), page_lock(card, memoryview(writable))]
    assert card.page_locked == {
        address_of(source): (source.nbytes, True),
        address_of(memoryview(writable)): (PAGE_BYTES, False),
    }
    for unlock in locks:
        unlock()
    card.insist_empty()


def test_copies_from_a_page_locked_source_read_it_when_they_run(card: FakeDriver, arena: CudaArena) -> None:
    data = bytearray(b"\1" * PAGE_BYTES)
    page_lock(card, memoryview(data))
    arena.map([range(1)])
    arena.copy_in(0, memoryview(data))
    data[:] = b"\2" * PAGE_BYTES
    assert read(arena, 0) == b"\2" * PAGE_BYTES


def test_copies_work_from_a_source_that_could_not_be_page_locked(
    card: FakeDriver, arena: CudaArena, source: memoryview
) -> None:
    card.broken = {"page_lock"}
    with pytest.raises(VmmError, match="page-lock"):
        page_lock(card, source)
    assert card.page_locked == {}
    arena.map([range(1)])
    arena.copy_in(0, source[:PAGE_BYTES])
    assert read(arena, 0) == source[:PAGE_BYTES]


# ---------------------------------------------------------------- the end


def test_close_gives_everything_back(card: FakeDriver, source: memoryview) -> None:
    arena = CudaArena("test", NUM_PAGES, PAGE_BYTES, calls=card)
    arena.map([range(NUM_PAGES)])
    arena.copy_in(0, source)
    arena.close()
    card.insist_empty()
    made = len(card.made)
    arena.close()
    arena.settle()
    assert arena.is_settled()
    assert len(card.made) == made


def test_each_failing_call_of_a_close_can_be_made_up_for(cuda: FakeCudaBackend, source: memoryview) -> None:
    card = cuda.calls

    def make() -> CudaArena:
        arena = CudaArena("test", NUM_PAGES, PAGE_BYTES, calls=card)
        arena.map([range(3), range(5, 6)])
        arena.copy_in(0, source[: 3 * PAGE_BYTES])
        return arena

    arenas, errors = [make()], []
    for error in each_failure(cuda, lambda: arenas[-1].close()):
        arena = arenas[-1]
        errors.append(error)
        agrees(card, arena)
        assert arena.mapped_bytes == 0 or error is not None
        arena.close()
        agrees(card, arena)
        card.insist_empty()
        arenas.append(make())
    assert len(errors) > 8


def test_two_arenas_of_one_card_do_not_meet(card: FakeDriver, source: memoryview) -> None:
    first, second = (CudaArena(name, 2, PAGE_BYTES, calls=card) for name in ("first", "second"))
    first.map([range(2)])
    second.map([range(2)])
    first.copy_in(0, source[:PAGE_BYTES])
    write(second, 0, 5)
    assert not first.is_settled()  # each has its own stream
    assert second.is_settled()
    second.close()
    assert read(first, 0) == source[:PAGE_BYTES]
    first.close()
    card.insist_empty()
