"""A memory file mapped as a whole: all its memory, in huge pages where the kernel gives them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from prism_sgl.allocator.file_memory import HUGE_PAGE_BYTES, allocate_all, map_file
from prism_sgl.allocator.host_calls import HostCalls
from prism_sgl.allocator.vmm import address_of

SIZE_BYTES = 3 * HUGE_PAGE_BYTES + 12288


@pytest.fixture
def fd() -> Iterator[int]:
    descriptor = HostCalls().memory_file("test", SIZE_BYTES)
    yield descriptor
    os.close(descriptor)


def lines_at(address: int) -> dict[str, int]:
    """KiB by name, of the mapping that holds this address (/proc/self/smaps); empty: nothing is mapped."""
    found: dict[str, int] = {}
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            head = line.split()
            if "-" in head[0] and not head[0].endswith(":"):
                first, last = (int(part, 16) for part in head[0].split("-"))
                inside = first <= address < last and head[1] != "---p"
            elif inside and head[-1] == "kB":
                found[head[0].rstrip(":")] = int(head[1])
    return found


def kernel_collapses() -> bool:
    """This kernel makes huge pages of a memory file when it is asked to."""
    calls = HostCalls()
    descriptor = calls.memory_file("probe", HUGE_PAGE_BYTES)
    view = map_file(descriptor, HUGE_PAGE_BYTES, writable=True)
    try:
        view[0] = 1
        calls.collapse(address_of(view), HUGE_PAGE_BYTES)
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.ENOSYS)
    finally:
        os.close(descriptor)
    return True


def test_all_of_it_is_there_and_zero(fd: int) -> None:
    view = map_file(fd, SIZE_BYTES, writable=True)
    allocate_all(fd, view)
    assert address_of(view) % HUGE_PAGE_BYTES == 0
    assert os.fstat(fd).st_blocks * 512 == SIZE_BYTES
    assert lines_at(address_of(view))["Rss"] == SIZE_BYTES >> 10
    assert not any(view)


def test_it_is_in_huge_pages_where_the_kernel_has_them(fd: int) -> None:
    if not kernel_collapses():
        pytest.skip("this kernel makes no huge pages of memory files (before 6.1, or denied)")
    view = map_file(fd, SIZE_BYTES, writable=True)
    allocate_all(fd, view)
    assert lines_at(address_of(view))["ShmemPmdMapped"] >= HUGE_PAGE_BYTES >> 10


def test_a_kernel_without_them_gives_small_pages(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(calls: HostCalls, address: int, size_bytes: int) -> None:
        raise OSError(errno.EINVAL, "madvise")

    monkeypatch.setattr(HostCalls, "collapse", refuse)
    view = map_file(fd, SIZE_BYTES, writable=True)
    allocate_all(fd, view)
    assert os.fstat(fd).st_blocks * 512 == SIZE_BYTES
    assert lines_at(address_of(view))["ShmemPmdMapped"] == 0
    assert not any(view)


def test_it_is_unmapped_when_the_last_view_is_gone(fd: int) -> None:
    view = map_file(fd, SIZE_BYTES, writable=False)
    address, part = address_of(view), view[10:20]
    assert view.readonly
    del view
    assert lines_at(address) and bytes(part) == bytes(10)
    del part
    assert not lines_at(address)
