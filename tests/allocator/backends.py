"""Both memory backends behind one face, so that what holds for any ``Vmm`` is tested on each of them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Protocol

from prism_sgl.allocator.vmm import Vmm
from prism_sgl.allocator.vmm_cuda import CudaArena
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.errors import VmmError
from tests.allocator.failing_calls import FailingCalls
from tests.allocator.fake_driver import BROKEN, SHORTAGE, FakeDriver


class Backend(Protocol):
    """Makes arenas, and makes their calls fail."""

    calls: FailingCalls | FakeDriver

    def arena(self, name: str, num_pages: int, page_bytes: int) -> Vmm: ...

    def fail_after(self, calls: int | None, *, shortage: bool = False) -> None:
        """So many calls succeed, then one fails."""


class HostBackend:
    def __init__(self) -> None:
        self.calls = FailingCalls()

    def arena(self, name: str, num_pages: int, page_bytes: int) -> Vmm:
        return HostArena(name, num_pages, page_bytes, self.calls)

    def fail_after(self, calls: int | None, *, shortage: bool = False) -> None:
        self.calls.fail_after = calls
        self.calls.errno = errno.ENOMEM if shortage else errno.EINVAL


class FakeCudaBackend:
    """Memory comes back as it was left, so that whoever does not fill it with zeros is caught."""

    def __init__(self) -> None:
        self.calls = FakeDriver(scrubs=False)

    def arena(self, name: str, num_pages: int, page_bytes: int) -> Vmm:
        return CudaArena(name, num_pages, page_bytes, calls=self.calls)

    def fail_after(self, calls: int | None, *, shortage: bool = False) -> None:
        self.calls.fail_after = calls
        self.calls.error = SHORTAGE if shortage else BROKEN


BACKENDS: dict[str, Callable[[], Backend]] = {"host": HostBackend, "cuda": FakeCudaBackend}


def write(arena: Vmm, page: int, byte: int) -> None:
    arena.copy_in(page * arena.page_bytes, memoryview(bytes([byte]) * arena.page_bytes))
    arena.settle()


def read(arena: Vmm, page: int) -> bytes:
    return read_bytes(arena, page * arena.page_bytes, arena.page_bytes)


def read_bytes(arena: Vmm, offset: int, size_bytes: int) -> bytes:
    seen = bytearray(size_bytes)
    arena.copy_out(offset, memoryview(seen))
    return bytes(seen)


def each_failure(
    backend: Backend, action: Callable[[], object], *, shortage: bool = False
) -> Iterator[VmmError | None]:
    """Do it with the first call failing, then with the second, until none fails. Yields what each round raised."""
    for calls in range(1000):
        backend.fail_after(calls, shortage=shortage)
        error = None
        try:
            action()
        except VmmError as raised:
            error = raised
        has_failed = backend.calls.fail_after is None
        backend.fail_after(None)
        assert has_failed or error is None
        yield error
        if not has_failed:
            return
    raise AssertionError("there are always more calls")
