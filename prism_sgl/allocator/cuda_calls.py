"""The CUDA driver calls of the card's backend, one method each, so that tests can make each of them fail.

The only import of the driver in the project (``cuda.bindings.driver``, of the cuda-python package). All calls work
in the device's primary context, which torch uses too, so addresses and streams of the two can be mixed.
"""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver

_PORTABLE = driver.CU_MEMHOSTREGISTER_PORTABLE
_READ_ONLY = driver.CU_MEMHOSTREGISTER_READ_ONLY


class DriverError(Exception):
    """A driver call failed. ``is_shortage``: the card has no memory for it."""

    def __init__(self, call: str, code: Any) -> None:
        name = getattr(code, "name", str(code))
        super().__init__(f"{call}: {name}")
        self.call = call
        self.is_shortage = code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY


class CudaCalls:
    """Every method raises DriverError. Sizes are bytes; addresses, handles, streams and events are integers."""

    def __init__(self, device: int = 0) -> None:
        self.device = device
        _call(driver.cuInit, 0)
        self._context = _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, device))
        _call(driver.cuCtxSetCurrent, self._context)
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE

    def granularity(self) -> int:
        """The least unit of physical memory: 2 MiB on every card so far."""
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(_call(driver.cuMemGetAllocationGranularity, self._kind, flag))

    def reserve(self, size_bytes: int) -> int:
        """An address range in which every access faults."""
        return int(_call(driver.cuMemAddressReserve, size_bytes, 0, 0, 0))

    def create(self, size_bytes: int) -> int:
        """Physical memory; returns its handle."""
        return int(_call(driver.cuMemCreate, size_bytes, self._kind, 0))

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        _call(driver.cuMemMap, address, size_bytes, 0, handle, 0)

    def allow_access(self, address: int, size_bytes: int) -> None:
        """Reads and writes from this device, for the whole range in one call."""
        _call(driver.cuMemSetAccess, address, size_bytes, [self._access], 1)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Memory whose handle was released before goes back to the card here."""
        _call(driver.cuMemUnmap, address, size_bytes)

    def release(self, handle: int) -> None:
        """The handle is ours no more; its memory stays for as long as it is mapped."""
        _call(driver.cuMemRelease, handle)

    def free_addresses(self, address: int, size_bytes: int) -> None:
        _call(driver.cuMemAddressFree, address, size_bytes)

    def new_stream(self) -> int:
        """A stream that does not wait for the legacy default stream, nor it for this one."""
        return int(_call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def synchronize(self, stream: int) -> None:
        _call(driver.cuStreamSynchronize, stream)

    def destroy_stream(self, stream: int) -> None:
        _call(driver.cuStreamDestroy, stream)

    def new_event(self) -> int:
        return int(_call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value))

    def record(self, event: int, stream: int) -> None:
        _call(driver.cuEventRecord, event, stream)

    def has_passed(self, event: int) -> bool:
        (code,) = driver.cuEventQuery(event)
        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if code != driver.CUresult.CUDA_SUCCESS:
            raise DriverError("cuEventQuery", code)
        return True

    def make_wait(self, stream: int, event: int) -> None:
        """Later work on ``stream`` begins only after ``event``; the caller does not wait."""
        _call(driver.cuStreamWaitEvent, stream, event, 0)

    def destroy_event(self, event: int) -> None:
        _call(driver.cuEventDestroy, event)

    def fill(self, address: int, byte: int, size_bytes: int, stream: int) -> None:
        _call(driver.cuMemsetD8Async, address, byte, size_bytes, stream)

    def copy_in(self, address: int, source: int, size_bytes: int, stream: int) -> None:
        _call(driver.cuMemcpyHtoDAsync, address, source, size_bytes, stream)

    def copy_out(self, address: int, target: int, size_bytes: int) -> None:
        """To any host memory; done when it returns. 52 GB/s where it is page-locked, else 1 to 2."""
        _call(driver.cuMemcpyDtoH, target, address, size_bytes)

    def limit_stack(self, size_bytes: int) -> None:
        """Stack of each thread that kernels may use without saying so; the context holds it for all threads at once."""
        _call(driver.cuCtxSetLimit, driver.CUlimit.CU_LIMIT_STACK_SIZE, size_bytes)

    def page_lock(self, address: int, size_bytes: int, *, read_only: bool) -> None:
        """Fix host memory in place, so that the card copies from it by itself at the link's speed. In any thread."""
        _call(driver.cuCtxSetCurrent, self._context)
        _call(driver.cuMemHostRegister, address, size_bytes, _PORTABLE | (_READ_ONLY if read_only else 0))

    def page_unlock(self, address: int) -> None:
        _call(driver.cuMemHostUnregister, address)


def _call(function: Any, *arguments: Any) -> Any:
    code, *results = function(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(function.__name__, code)
    return results[0] if results else None
