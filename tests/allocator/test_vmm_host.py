from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.errors import VmmError
from tests.allocator.failing_calls import FailingCalls

PAGE_BYTES = 2 << 20


@pytest.fixture
def calls() -> FailingCalls:
    return FailingCalls()


@pytest.fixture
def arena(calls: FailingCalls) -> Iterator[HostArena]:
    arena = HostArena("test", 8, PAGE_BYTES, calls)
    yield arena
    calls.repair()
    arena.close()


def write(arena: HostArena, page: int, byte: int) -> None:
    ctypes.memset(arena.base + page * PAGE_BYTES, byte, PAGE_BYTES)


def read(arena: HostArena, page: int) -> bytes:
    return ctypes.string_at(arena.base + page * PAGE_BYTES, PAGE_BYTES)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_goes_back_to_the_system_at_unmap(arena: HostArena) -> None:
    """test_vmm.py asks the file; here the process."""
    before_bytes = rss_bytes()
    arena.map([range(8)])
    for page in range(8):
        write(arena, page, 1)
    assert arena.physical_bytes() == arena.mapped_bytes == 8 * PAGE_BYTES
    assert rss_bytes() - before_bytes >= 8 * PAGE_BYTES * 0.9
    arena.unmap([range(2, 8)])
    assert arena.physical_bytes() == arena.mapped_bytes == arena.held_bytes == 2 * PAGE_BYTES
    assert rss_bytes() - before_bytes <= 3 * PAGE_BYTES
    assert read(arena, 1) == b"\1" * PAGE_BYTES
    arena.check()


def test_memory_is_there_before_the_first_touch(arena: HostArena) -> None:
    """Else a full machine would answer a touch with SIGBUS."""
    arena.map([range(3)])
    assert arena.physical_bytes() == 3 * PAGE_BYTES


@pytest.mark.parametrize("page", [0, 2], ids=["unmapped again", "never mapped"])
def test_touching_an_unmapped_page_faults(page: int) -> None:
    code = f"""
import ctypes
from prism_sgl.allocator.vmm_host import HostArena
arena = HostArena("fault", 3, {PAGE_BYTES})
arena.map([range(0, 2)])
ctypes.memset(arena.base, 1, 2 * {PAGE_BYTES})
arena.unmap([range(0, 1)])
print(ctypes.string_at(arena.base + {PAGE_BYTES}, 1)[0], flush=True)
ctypes.string_at(arena.base + {page} * {PAGE_BYTES}, 1)
print("alive", flush=True)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert child.stdout == "1\n"
    assert child.returncode == -signal.SIGSEGV


def test_others_find_the_memory_by_the_name_of_its_file(arena: HostArena) -> None:
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    assert any(link.startswith("/memfd:prism:test") for link in links)


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_a_long_name_is_cut() -> None:
    HostArena("ä" * 300, 1, PAGE_BYTES).close()


@pytest.mark.parametrize("broken", ["hide", "punch"])
def test_a_failing_undo_leaves_true_books(arena: HostArena, calls: FailingCalls, broken: str) -> None:
    calls.broken = {broken, "map"}
    with pytest.raises(VmmError):
        arena.map([range(2)])
    assert arena.mapped_bytes == 0
    assert arena.held_bytes == arena.physical_bytes() == 2 * PAGE_BYTES
    arena.check()
    calls.broken = {broken}
    with pytest.raises(VmmError, match="stuck"):
        arena.map([range(2)])
    arena.check()
    calls.broken = set()
    arena.map([range(1, 2)])
    assert read(arena, 1) == bytes(PAGE_BYTES)
    assert arena.held_bytes == arena.physical_bytes() == PAGE_BYTES
    arena.check()


def test_a_failing_hide_leaves_the_page_mapped(arena: HostArena, calls: FailingCalls) -> None:
    arena.map([range(1), range(2, 3)])
    calls.fail_after = 2  # hide and punch of the first run work
    with pytest.raises(VmmError):
        arena.unmap([range(1), range(2, 3)])
    assert not arena.is_mapped(0)
    assert arena.is_mapped(2)
    write(arena, 2, 1)
    assert arena.held_bytes == arena.physical_bytes() == PAGE_BYTES
    arena.check()


def test_a_failing_punch_leaves_the_page_stuck_until_it_works(arena: HostArena, calls: FailingCalls) -> None:
    arena.map([range(1)])
    write(arena, 0, 9)
    calls.broken = {"punch"}
    with pytest.raises(VmmError):
        arena.unmap([range(1)])
    assert not arena.is_mapped(0)
    assert arena.held_bytes == arena.physical_bytes() == PAGE_BYTES
    arena.check()
    calls.broken = set()
    arena.map([range(1)])
    assert read(arena, 0) == bytes(PAGE_BYTES)
    arena.check()


def test_close_gives_addresses_and_memory_back(calls: FailingCalls) -> None:
    before = len(os.listdir("/proc/self/fd"))
    arena = HostArena("closing", 2, PAGE_BYTES, calls)
    arena.map([range(2)])
    arena.close()
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert "prism:closing" not in Path("/proc/self/maps").read_text()
    assert arena.held_bytes == arena.physical_bytes() == 0
    with pytest.raises(ValueError, match="closed"):
        arena.map([range(1)])


def test_neighbouring_pages_share_one_kernel_mapping(arena: HostArena) -> None:
    for page in range(8):
        arena.map([range(page, page + 1)])
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "prism:test" in line]
    assert len(maps) == 1
