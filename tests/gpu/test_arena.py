"""CudaArena on the real driver: what the fake of tests/allocator assumes, and what the design rests on."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest

from prism_sgl.allocator.vmm import DeviceFullError

torch = pytest.importorskip("torch")

PAGE = 64 << 20

STRAY = """
import torch
from prism_sgl.engine.device import CudaDevice
device = CudaDevice()
arena = device.arena("stray", 4 * {page}, {page}, zeroed=False)
arena.map([range(0, 1)])
view = device.bytes_at(arena.base, 4 * {page})
view[:100].fill_(1)
torch.cuda.synchronize()
print("mapped fine", flush=True)
view[{page} + 5].fill_(1)
torch.cuda.synchronize()
print("a stray write went through")
"""


def new_arena(num_pages: int, *, zeroed: bool = False):  # type: ignore[no-untyped-def]
    from prism_sgl.allocator.vmm_cuda import CudaArena

    torch.zeros(1, device="cuda")
    return CudaArena("test", num_pages, PAGE, zeroed=zeroed)


def free_bytes() -> int:
    return int(torch.cuda.mem_get_info()[0])


def test_the_card_shows_what_is_mapped() -> None:
    arena = new_arena(40)
    before = free_bytes()
    arena.map([range(10), range(20, 25)])
    assert before - free_bytes() == arena.mapped_bytes == 15 * PAGE
    arena.unmap([range(5, 10)])
    assert before - free_bytes() == 10 * PAGE
    arena.check()
    arena.close()
    assert free_bytes() == before


def test_a_full_card_is_a_shortage_that_leaves_nothing() -> None:
    before = free_bytes()
    arena = new_arena(4000)
    with pytest.raises(DeviceFullError):
        arena.map([range(4000)])
    assert arena.held_bytes == 0
    arena.check()
    arena.close()
    assert abs(free_bytes() - before) < 32 << 20


def test_new_pages_read_as_zero() -> None:
    from prism_sgl.allocator.cuda_calls import CudaCalls
    from prism_sgl.allocator.vmm_cuda import gives_zeroed_memory

    torch.zeros(1, device="cuda")
    scrubs = gives_zeroed_memory(CudaCalls(0), 2 << 20)
    arena = new_arena(64, zeroed=not scrubs)
    for _ in range(3):
        arena.map([range(64)])
        seen = bytearray(PAGE)
        for page in range(0, 64, 7):
            arena.copy_out(page * PAGE, memoryview(seen))
            assert not any(seen)
            arena.copy_in(page * PAGE, memoryview(b"\xa5" * PAGE))
        arena.unmap([range(64)])
    arena.close()


def test_copies_arrive_and_hold_work_back() -> None:
    from prism_sgl.engine.device import CudaDevice

    device = CudaDevice()
    arena = device.arena("copies", 16 * PAGE, PAGE, zeroed=False)
    arena.map([range(16)])
    view = device.bytes_at(arena.base, 16 * PAGE)
    source = mmap.mmap(-1, 16 * PAGE)
    source[:] = bytes([7]) * (16 * PAGE)
    unlock = device.page_lock(memoryview(source))
    stream = torch.cuda.Stream()
    arena.copy_in(0, memoryview(source))
    assert not arena.is_settled(), "a GiB cannot have arrived yet"
    with torch.cuda.stream(stream):
        arena.hold_back(stream.cuda_stream, 16 * PAGE)
        wrong = (view != 7).sum()
    assert int(wrong) == 0
    arena.settle()
    assert arena.is_settled()
    arena.close()
    unlock()


def test_a_stray_access_to_an_unmapped_page_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRAY.format(page=PAGE)], capture_output=True, text=True, timeout=100
    )
    assert "mapped fine" in done.stdout
    assert "went through" not in done.stdout
    assert "illegal memory access" in done.stderr
