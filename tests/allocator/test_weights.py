from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest

from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.allocator.vmm_cuda import CudaArena, page_lock
from prism_sgl.allocator.weights import Image, Layout, WeightsArena
from prism_sgl.errors import VmmError
from prism_sgl.units import GRANULE_BYTES
from tests.allocator.backends import Backend, each_failure, read_bytes, write
from tests.allocator.conftest import BUDGET, join
from tests.allocator.fake_driver import FakeDriver

PAGE_BYTES = 4 << 20
PAGE_GRANULES = PAGE_BYTES // GRANULE_BYTES
NUM_PAGES = 4
GRANULES = NUM_PAGES * PAGE_GRANULES


@pytest.fixture
def image() -> Iterator[Image]:
    image = Image.create("test", NUM_PAGES * PAGE_BYTES)
    with image.writable_view() as view:
        for start in range(0, len(view), 1 << 20):
            view[start : start + (1 << 20)] = os.urandom(4096) * 256
    image.seal()
    yield image
    image.close()


@pytest.fixture
def arena(owner: Owner, backend: Backend, image: Image) -> Iterator[WeightsArena]:
    vmm = backend.arena("weights", NUM_PAGES, PAGE_BYTES)
    arena = WeightsArena(vmm, owner)
    yield arena
    backend.calls.repair()
    arena.check()
    vmm.close()


@pytest.fixture
def copies(arena: WeightsArena, monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The pages that are copied in, a run each."""
    begun: list[range] = []
    copy_in = arena.vmm.copy_in

    def note(offset: int, source: memoryview) -> None:
        begun.append(range(offset // PAGE_BYTES, -(-(offset + source.nbytes) // PAGE_BYTES)))
        copy_in(offset, source)

    monkeypatch.setattr(arena.vmm, "copy_in", note)
    return begun


def mapped_pages(arena: WeightsArena) -> list[int]:
    return [page for page in range(NUM_PAGES) if arena.vmm.is_mapped(page)]


def holds(arena: WeightsArena, image: Image) -> bool:
    """Every byte is the image's."""
    return read_bytes(arena.vmm, 0, image.size_bytes) == image.readonly_view()


def scribble(arena: WeightsArena, pages: range) -> None:
    """Bytes by which to see that a page was not copied again."""
    for page in pages:
        write(arena.vmm, page, 0xEE)


def test_a_layout_aligns_every_storage() -> None:
    layout = Layout.plan([100, 0, 256, 1], align=256)
    assert layout.offsets == (0, 256, 256, 512)
    assert layout.total_bytes == 768
    assert Layout.plan([]) == Layout((), 0)
    with pytest.raises(ValueError):
        Layout.plan([-1])


def test_wakes_with_the_same_bytes_at_the_same_address(
    arena: WeightsArena, image: Image, owner: Owner
) -> None:
    assert arena.materialise(arena.vmm.size_bytes)
    assert owner.held(Kind.WEIGHTS) == GRANULES
    arena.adopt(image)
    base = arena.vmm.base
    for _ in range(2):
        arena.sleep()
        assert (owner.held(Kind.WEIGHTS), arena.vmm.physical_bytes(), arena.mapped) == (0, 0, False)
        assert arena.missing_bytes == image.size_bytes
        assert arena.wake()
        arena.vmm.settle()
        assert (arena.vmm.base, arena.mapped, arena.missing_bytes) == (base, True, 0)
        assert holds(arena, image)
        scribble(arena, range(NUM_PAGES))  # a wake brings back the image, not what was here


def test_weights_may_be_made_a_part_at_a_time(arena: WeightsArena, owner: Owner) -> None:
    assert arena.unmapped_bytes(PAGE_BYTES + 1) == 2 * PAGE_BYTES  # what is asked for is what is taken
    assert arena.materialise(PAGE_BYTES + 1)
    assert mapped_pages(arena) == [0, 1]
    assert arena.unmapped_bytes(PAGE_BYTES + 1) == 0
    assert arena.unmapped_bytes(2 * PAGE_BYTES + 1) == PAGE_BYTES
    assert arena.materialise(PAGE_BYTES)
    assert owner.held(Kind.WEIGHTS) == 2 * PAGE_GRANULES
    assert not arena.mapped
    assert arena.materialise(arena.vmm.size_bytes)
    assert arena.materialise(arena.vmm.size_bytes)
    assert (arena.mapped, owner.held(Kind.WEIGHTS)) == (True, GRANULES)


def test_the_last_pages_are_given_back_first(arena: WeightsArena, image: Image, owner: Owner) -> None:
    assert arena.materialise(arena.vmm.size_bytes)
    arena.adopt(image)
    assert [arena.give_back(-1), arena.give_back(0)] == [0, 0]
    assert arena.give_back(1) == 1
    assert mapped_pages(arena) == [0, 1, 2]
    assert arena.give_back(2) == 2
    assert mapped_pages(arena) == [0]
    assert owner.held(Kind.WEIGHTS) == PAGE_GRANULES
    assert arena.missing_bytes == 3 * PAGE_BYTES
    assert arena.give_back(2) == 1
    assert arena.give_back(2) == 0
    assert owner.held(Kind.WEIGHTS) == arena.vmm.physical_bytes() == 0


def test_a_wake_copies_what_is_missing_and_no_more(
    arena: WeightsArena, image: Image, copies: list[range]
) -> None:
    arena.adopt(image)
    assert arena.wake()
    assert copies == [range(NUM_PAGES)]
    scribble(arena, range(NUM_PAGES))
    copies.clear()
    assert arena.wake()
    assert copies == []
    arena.give_back(2)
    assert arena.wake()
    arena.vmm.settle()
    assert copies == [range(2, NUM_PAGES)]
    half = 2 * PAGE_BYTES
    assert read_bytes(arena.vmm, 0, half) == b"\xee" * half
    assert read_bytes(arena.vmm, half, half) == image.readonly_view()[half:]


def test_a_shortage_changes_nothing(
    arena: WeightsArena, image: Image, ledger: Ledger, backend: Backend
) -> None:
    arena.adopt(image)
    other = join(ledger, "code")
    assert other.try_reserve(Kind.KV, BUDGET - GRANULES + 1)
    assert not arena.wake()
    assert (arena.leased_granules, arena.mapped) == (0, False)
    arena.check()
    other.release(Kind.KV, 1)
    backend.fail_after(1, shortage=True)
    assert not arena.wake()
    assert (arena.leased_granules, arena.mapped) == (0, False)
    arena.check()
    assert arena.wake()
    arena.give_back(1)
    assert other.try_reserve(Kind.KV, 1)
    assert not arena.wake()
    assert mapped_pages(arena) == [0, 1, 2]


def test_a_wake_that_fails_half_way_gives_back_what_it_took(
    arena: WeightsArena, image: Image, backend: Backend
) -> None:
    arena.adopt(image)
    assert arena.wake()
    arena.give_back(2)
    for error in each_failure(backend, arena.wake):
        kept = GRANULES if error is None else 2 * PAGE_GRANULES
        assert arena.leased_granules == kept
        arena.check()
        arena.vmm.settle()
        if error is None:
            assert holds(arena, image)
            arena.give_back(2)
        assert mapped_pages(arena) == [0, 1]


def test_pages_without_bytes_that_could_not_be_given_back_are_still_missing(
    arena: WeightsArena, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy fails, and so does the unmapping: they are mapped, and must not pass for the model's."""

    def fail(*args: object) -> None:
        raise VmmError("broken")

    arena.adopt(image)
    assert arena.wake()
    arena.give_back(2)
    with monkeypatch.context() as patch:
        patch.setattr(arena.vmm, "copy_in", fail)
        patch.setattr(arena.vmm, "unmap", fail)
        with pytest.raises(VmmError):
            arena.wake()
    arena.check()
    assert mapped_pages(arena) == [0, 1, 2, 3]
    assert (arena.leased_granules, arena.mapped, arena.missing_bytes) == (GRANULES, False, 2 * PAGE_BYTES)
    assert arena.wake()
    assert (arena.mapped, arena.missing_bytes) == (True, 0)
    assert holds(arena, image)


def test_a_sleep_that_failed_can_be_repeated(
    arena: WeightsArena, image: Image, backend: Backend, owner: Owner
) -> None:
    arena.adopt(image)
    assert arena.wake()
    backend.calls.broken = {"punch", "unmap"}
    with pytest.raises(VmmError):
        arena.sleep()
    # Stuck or still mapped, but not given back.
    assert arena.leased_granules == owner.held(Kind.WEIGHTS) == GRANULES
    arena.check()
    backend.calls.repair()
    arena.sleep()
    assert arena.leased_granules == owner.held(Kind.WEIGHTS) == 0
    assert arena.wake()
    assert holds(arena, image)


def test_copies_of_a_page_locked_image_are_done_before_it_is_unlocked(owner: Owner) -> None:
    card = FakeDriver()
    vmm = CudaArena("weights", NUM_PAGES, PAGE_BYTES, calls=card)
    image = Image.create("test", NUM_PAGES * PAGE_BYTES, partial(page_lock, card))
    image.seal()
    arena = WeightsArena(vmm, owner, image)
    for _ in range(3):
        assert arena.wake()
        arena.sleep()
    assert card.made.count("page_lock") == 1
    vmm.close()
    image.close()
    card.insist_empty()


def test_a_wake_does_not_wait_for_its_copies(owner: Owner, image: Image) -> None:
    card = FakeDriver()
    vmm = CudaArena("weights", NUM_PAGES, PAGE_BYTES, zeroed=False, calls=card)
    arena = WeightsArena(vmm, owner, image)
    assert arena.wake()
    assert (arena.mapped, vmm.is_settled()) == (True, False)
    arena.give_back(1)  # waits for what is on its way there
    assert vmm.is_settled()
    vmm.close()
    card.insist_empty()


def test_only_a_sealed_image_of_the_right_size_is_adopted(arena: WeightsArena, image: Image) -> None:
    with pytest.raises(ValueError, match="lost"):
        arena.sleep()
    with pytest.raises(ValueError, match="no image"):
        arena.wake()
    open_image = Image.create("open", NUM_PAGES * PAGE_BYTES)
    with pytest.raises(VmmError, match="sealed"):
        arena.adopt(open_image)
    open_image.close()
    small = Image.create("small", 4096)
    with pytest.raises(VmmError, match="bytes"):
        arena.adopt(small)
    small.close()


def test_a_sealed_image_cannot_change(image: Image) -> None:
    assert image.is_sealed
    image.seal()
    with pytest.raises(PermissionError):
        mmap.mmap(image.fileno(), image.size_bytes)
    with pytest.raises(PermissionError):
        os.ftruncate(image.fileno(), 1)
    with pytest.raises(PermissionError):
        os.pwrite(image.fileno(), b"x", 0)
    with pytest.raises(TypeError):
        image.readonly_view()[0] = 1
    with pytest.raises(ValueError, match="before it is sealed"), image.writable_view():
        pass


def test_the_mapping_that_its_maker_keeps_can_no_longer_be_written() -> None:
    code = """
import ctypes
from prism_sgl.allocator.vmm import address_of
from prism_sgl.allocator.weights import Image
image = Image.create("test", 4096)
with image.writable_view() as view:
    view[0] = 7
    address = address_of(view)
image.seal()
assert address_of(image.readonly_view()) == address and image.readonly_view()[0] == 7
print("sealed", flush=True)
ctypes.memset(address, 1, 1)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.stdout, child.returncode) == ("sealed\n", -signal.SIGSEGV)


def test_an_image_that_may_still_change_is_read_by_nobody() -> None:
    image = Image.create("test", 4096)
    with pytest.raises(ValueError, match="not sealed"):
        image.readonly_view()
    image.seal()
    view = image.readonly_view()
    assert image.readonly_view() is view
    assert view.readonly and view[0] == 0
    image.close()


def test_an_image_is_page_locked_once_until_it_is_closed(image: Image) -> None:
    card = FakeDriver()
    lock = partial(page_lock, card)
    made = Image.create("made", 1 << 20, lock)
    made.seal()
    made.page_lock(lock)
    read = Image.from_fd(os.dup(image.fileno()), image.size_bytes)
    read.page_lock(lock)
    assert sorted(card.page_locked.values()) == [(1 << 20, False), (image.size_bytes, True)]
    for one in (made, read):
        one.check()
        assert one.is_page_locked
        one.close()
    card.insist_empty()


def test_all_memory_of_an_image_is_there_at_once_and_shared() -> None:
    image = Image.create("test", 1 << 20)
    assert os.fstat(image.fileno()).st_blocks * 512 == 1 << 20
    other = Image.from_fd(os.dup(image.fileno()), 1 << 20)
    with image.writable_view() as view:
        view[:3] = b"abc"
    image.seal()
    assert bytes(other.readonly_view()[:3]) == b"abc"
    with pytest.raises(VmmError, match="bytes"):
        Image.from_fd(os.dup(image.fileno()), 1 << 10)
    other.close()
    image.close()


def test_no_memory_for_an_image_is_an_error_not_a_signal() -> None:
    code = f"""
import resource
from prism_sgl.allocator.weights import Image
from prism_sgl.errors import VmmError
resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, resource.RLIM_INFINITY))
try:
    Image.create("large", 2 << 20)
except VmmError as error:
    print(error)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "no host memory for an image of 2097152 bytes" in child.stdout
