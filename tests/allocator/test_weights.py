from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.allocator.weights import Image, Layout, WeightsArena
from prism_sgl.errors import VmmError
from tests.allocator.conftest import BUDGET, join
from tests.allocator.failing_calls import FailingCalls

PAGE_BYTES = 4 << 20
NUM_PAGES = 3


@pytest.fixture
def calls() -> FailingCalls:
    return FailingCalls()


@pytest.fixture
def image() -> Iterator[Image]:
    image = Image.create("test", NUM_PAGES * PAGE_BYTES)
    with image.writable_view() as view:
        view[:] = os.urandom(4096) * (len(view) // 4096)
    image.seal()
    yield image
    image.close()


@pytest.fixture
def arena(owner: Owner, calls: FailingCalls) -> Iterator[WeightsArena]:
    vmm = HostArena("weights", NUM_PAGES, PAGE_BYTES, calls)
    arena = WeightsArena(vmm, owner)
    yield arena
    arena.check()
    vmm.close()


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
    assert arena.materialise()
    assert owner.held(Kind.WEIGHTS) == 6
    arena.adopt(image)
    base = arena.vmm.base
    for _ in range(2):
        arena.sleep()
        assert (owner.held(Kind.WEIGHTS), arena.vmm.physical_bytes(), arena.mapped) == (0, 0, False)
        assert arena.wake()
        assert (arena.vmm.base, arena.mapped) == (base, True)
        assert ctypes.string_at(base, image.size_bytes) == bytes(image.readonly_view())
        ctypes.memset(base, 0, image.size_bytes)  # a wake brings back the image, not what was here


def test_a_shortage_changes_nothing(
    arena: WeightsArena, image: Image, ledger: Ledger, calls: FailingCalls
) -> None:
    arena.adopt(image)
    other = join(ledger, "code")
    assert other.try_reserve(Kind.KV, BUDGET - 5)
    assert not arena.wake()
    arena.check()
    other.release(Kind.KV, 1)
    calls.fail_after = 1
    assert not arena.wake()
    arena.check()
    assert arena.leased_granules == 0
    assert arena.wake()


def test_a_failing_copy_gives_everything_back(
    arena: WeightsArena, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(offset: int, source: memoryview) -> None:
        raise VmmError("copy")

    arena.adopt(image)
    monkeypatch.setattr(arena.vmm, "copy_in", fail)
    with pytest.raises(VmmError):
        arena.wake()
    assert arena.leased_granules == 0
    arena.check()


def test_a_sleep_that_failed_can_be_repeated(arena: WeightsArena, image: Image, calls: FailingCalls) -> None:
    arena.adopt(image)
    assert arena.wake()
    calls.broken = {"punch"}
    with pytest.raises(VmmError):
        arena.sleep()
    assert arena.leased_granules == 6  # stuck: unmapped, but not given back
    calls.broken = set()
    arena.sleep()
    assert arena.leased_granules == 0
    assert arena.wake()
    arena.check()


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
    with pytest.raises(TypeError):
        image.readonly_view()[0] = 1


def test_an_image_is_not_sealed_while_somebody_may_write_it() -> None:
    image = Image.create("test", 4096)
    with image.writable_view(), pytest.raises(VmmError, match="mapped for writing"):
        image.seal()
    assert not image.is_sealed
    view = image.readonly_view()  # reading does not stand in the way
    image.seal()
    assert view[0] == 0
    image.close()


def test_all_memory_of_an_image_is_there_at_once_and_shared() -> None:
    image = Image.create("test", 1 << 20)
    assert os.fstat(image.fileno()).st_blocks * 512 == 1 << 20
    other = Image.from_fd(os.dup(image.fileno()), 1 << 20)
    with image.writable_view() as view:
        view[:3] = b"abc"
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
resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, {resource.RLIM_INFINITY}))
try:
    Image.create("large", 2 << 20)
except VmmError as error:
    print(error)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "no host memory for an image of 2097152 bytes" in child.stdout
