"""What any ``Vmm`` does, on both backends. What only one of them does: test_vmm_host.py, test_vmm_cuda.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from prism_sgl.allocator.vmm import DeviceFullError, Vmm, merge_runs, num_pages_in
from tests.allocator.backends import Backend, each_failure, read, read_bytes, write

PAGE_BYTES = 64 << 10
NUM_PAGES = 8


@pytest.fixture
def arena(backend: Backend) -> Iterator[Vmm]:
    arena = backend.arena("test", NUM_PAGES, PAGE_BYTES)
    yield arena
    backend.calls.repair()
    arena.close()
    assert arena.held_bytes == arena.physical_bytes() == 0


def test_neighbouring_runs_are_one_call() -> None:
    runs = [range(4, 6), range(0, 2), range(2, 4), range(8, 9), range(7, 7)]
    assert merge_runs(runs) == [range(0, 6), range(8, 9)]
    assert num_pages_in(runs) == 7


def test_a_page_may_not_occur_twice() -> None:
    with pytest.raises(ValueError, match="page 1 occurs twice"):
        merge_runs([range(0, 2), range(1, 3)])
    with pytest.raises(ValueError, match="not a run"):
        merge_runs([range(0, 4, 2)])


@pytest.mark.parametrize(
    ("num_pages", "page_bytes"), [(0, PAGE_BYTES), (1, 0), (1, PAGE_BYTES + 1), (-1, 4096)]
)
def test_an_arena_has_whole_pages(backend: Backend, num_pages: int, page_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{num_pages} pages of {page_bytes} bytes"):
        backend.arena("test", num_pages, page_bytes)


def test_mapped_pages_keep_what_is_written(arena: Vmm) -> None:
    arena.map([range(1, 3), range(5, 6)])
    for page in (1, 2, 5):
        write(arena, page, page)
    arena.unmap([range(2, 3)])
    arena.map([range(6, 8)])
    assert [read(arena, page)[:1] for page in (1, 5, 6, 7)] == [b"\1", b"\5", b"\0", b"\0"]
    assert read(arena, 5) == b"\5" * PAGE_BYTES
    assert [page for page in range(NUM_PAGES) if arena.is_mapped(page)] == [1, 5, 6, 7]
    arena.check()


def test_memory_comes_at_map_and_goes_at_unmap(arena: Vmm) -> None:
    assert arena.size_bytes == NUM_PAGES * PAGE_BYTES
    assert arena.mapped_bytes == arena.held_bytes == arena.physical_bytes() == 0
    base = arena.base
    arena.map([range(NUM_PAGES)])
    assert arena.mapped_bytes == arena.held_bytes == arena.physical_bytes() == NUM_PAGES * PAGE_BYTES
    arena.unmap([range(2, NUM_PAGES)])
    assert arena.mapped_bytes == arena.held_bytes == arena.physical_bytes() == 2 * PAGE_BYTES
    arena.map([])
    arena.unmap([])
    assert (arena.mapped_bytes, arena.base) == (2 * PAGE_BYTES, base)
    arena.check()


def test_a_page_mapped_again_reads_as_zero(arena: Vmm) -> None:
    arena.map([range(1)])
    write(arena, 0, 0xFF)
    arena.unmap([range(1)])
    arena.map([range(2)])
    assert read(arena, 0) == read(arena, 1) == bytes(PAGE_BYTES)


@pytest.mark.parametrize("runs", [[range(7, 9)], [range(-1, 1)], [range(3, 5)], [range(1), range(1)]])
def test_a_wrong_run_changes_nothing(arena: Vmm, runs: list[range]) -> None:
    arena.map([range(4, 5)])
    with pytest.raises(ValueError):
        arena.map(runs)
    with pytest.raises(ValueError):
        arena.unmap(runs)
    assert arena.mapped_bytes == PAGE_BYTES
    arena.check()


def test_copies_only_between_mapped_pages(arena: Vmm) -> None:
    arena.map([range(2)])
    data = memoryview(bytes(range(256)) * (PAGE_BYTES // 256))
    arena.copy_in(PAGE_BYTES // 2, data)
    arena.settle()
    assert read_bytes(arena, PAGE_BYTES // 2, PAGE_BYTES) == data
    assert read_bytes(arena, PAGE_BYTES // 2 + 7, 3) == bytes([7, 8, 9])
    arena.copy_in(0, data[:0])
    assert read_bytes(arena, 0, 0) == b""
    for wrong in (
        lambda: arena.copy_in(PAGE_BYTES + 1, data),
        lambda: read_bytes(arena, PAGE_BYTES + 1, PAGE_BYTES),
    ):
        with pytest.raises(ValueError, match="mapped"):
            wrong()
    for offset in (NUM_PAGES * PAGE_BYTES - 1, -1):
        with pytest.raises(ValueError, match="fit"):
            arena.copy_in(offset, data)
        with pytest.raises(ValueError, match="fit"):
            read_bytes(arena, offset, PAGE_BYTES)


def test_after_settle_every_copy_is_there(arena: Vmm) -> None:
    assert arena.is_settled()
    source = memoryview(bytes(range(256)) * (4 * PAGE_BYTES // 256))
    arena.map([range(4)])
    for page in range(4):
        arena.copy_in(page * PAGE_BYTES, source[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
    arena.settle()
    assert arena.is_settled()
    assert read_bytes(arena, 0, 4 * PAGE_BYTES) == source
    arena.settle()
    arena.check()


def test_what_is_copied_out_was_copied_in_before(arena: Vmm) -> None:
    arena.map([range(1)])
    arena.copy_in(0, memoryview(b"\7" * PAGE_BYTES))
    assert read(arena, 0) == b"\7" * PAGE_BYTES


@pytest.mark.parametrize("shortage", [False, True])
def test_each_failing_call_of_a_map_undoes_the_earlier_ones(
    backend: Backend, arena: Vmm, shortage: bool
) -> None:
    arena.map([range(2, 3)])
    write(arena, 2, 7)
    errors = []
    for error in each_failure(backend, lambda: arena.map([range(0, 2), range(4, 6)]), shortage=shortage):
        errors.append(error)
        assert error is None or isinstance(error, DeviceFullError) is shortage
        num_pages = 5 if error is None else 1
        assert arena.mapped_bytes == arena.held_bytes == arena.physical_bytes() == num_pages * PAGE_BYTES
        assert read(arena, 2) == b"\7" * PAGE_BYTES
        arena.check()
    assert len(errors) > 4
    assert errors.index(None) == len(errors) - 1
    assert read(arena, 0) == read(arena, 5) == bytes(PAGE_BYTES)


def test_each_failing_call_of_an_unmap_leaves_true_books(backend: Backend, arena: Vmm) -> None:
    pages = range(NUM_PAGES)
    runs = [range(1), range(2, 4), range(5, 6)]
    written: dict[int, int] = {}

    def fill() -> None:
        arena.map([range(page, page + 1) for page in pages if not arena.is_mapped(page)])
        for page in pages:
            written[page] = (page + len(written)) % 256
            write(arena, page, written[page])

    fill()
    for error in each_failure(backend, lambda: arena.unmap(runs)):
        unmapped = [page for page in pages if not arena.is_mapped(page)]
        assert unmapped in ([0, 2, 3, 5], [0, 2, 3], [0], [])[: 1 if error is None else 4]
        assert arena.mapped_bytes <= arena.physical_bytes() == arena.held_bytes
        arena.check()
        for page in set(pages) - set(unmapped):
            assert read(arena, page) == bytes([written[page]]) * PAGE_BYTES
        arena.unmap([])  # whatever is stuck comes free with the next call
        assert arena.mapped_bytes == arena.physical_bytes() == arena.held_bytes
        fill()


def test_each_failing_call_of_a_reservation_leaves_nothing(backend: Backend) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made: list[Vmm] = []
    errors = []
    for error in each_failure(backend, lambda: made.append(backend.arena("test", NUM_PAGES, PAGE_BYTES))):
        errors.append(error)
        if error is None:
            made[0].close()
        backend.calls.insist_empty()
        assert len(os.listdir("/proc/self/fd")) == before
    assert len(errors) > 2 and len(made) == 1


def test_a_closed_arena_refuses_everything(backend: Backend) -> None:
    arena = backend.arena("closing", 2, PAGE_BYTES)
    arena.map([range(2)])
    arena.copy_in(0, memoryview(b"x"))
    arena.close()
    arena.close()
    assert arena.held_bytes == arena.physical_bytes() == 0
    for wrong in (
        lambda: arena.map([range(1)]),
        lambda: arena.unmap([range(1)]),
        lambda: arena.copy_in(0, memoryview(b"x")),
        lambda: read_bytes(arena, 0, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            wrong()
    arena.check()
