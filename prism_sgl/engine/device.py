"""What this process asks of its device beside pages: arenas, tensors over raw addresses, and what it uses itself."""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch

from prism_sgl.allocator.vmm import GRANULE_BYTES, Vmm
from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.errors import VmmError

log = logging.getLogger(__name__)

# A context holds this much stack for each thread that the card can run at once: 270,336 on an H100, so the default of
# 1 KiB is 264 MiB, asleep too. Only kernels with recursion or calls that the compiler cannot follow need it; what
# others need is known when they are loaded, and the driver then makes more.
_STACK_BYTES = 256


class Device(Protocol):
    """There are two: host memory that stands in for a card, and a card."""

    def arena(self, name: str, size_bytes: int, page_bytes: int, *, zeroed: bool) -> Vmm:
        """Reserve an address range; nothing is mapped. ``zeroed``: no page may show what others left in it."""

    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        """A uint8 tensor ``[size_bytes]`` over memory that an arena owns. The first page must be mapped."""

    def page_lock(self, source: memoryview) -> Callable[[], None]:
        """Fix host bytes in place, so that copies run at the speed of the link; returns what undoes it. In any thread.

        Where the system refuses, that is said, and copies work all the same, but slowly.
        """

    def synchronize(self) -> None:
        """Wait until the device has done all work of this process."""

    def trim(self) -> None:
        """Give back what torch keeps for later."""

    def cap_torch(self, size_bytes: int) -> None:
        """From now on torch fails with its own out-of-memory error rather than hold more than this, caches included."""

    def used_bytes(self) -> int:
        """What this process holds on the device, arenas included: context, modules, graphs, torch's memory."""

    def free_granules(self) -> int | None:
        """What the device shows as free; None: memory is back as soon as its process has ended."""


class HostDevice:
    """Memory beside the arenas is the host's, not the budget's: nothing to count."""

    def arena(self, name: str, size_bytes: int, page_bytes: int, *, zeroed: bool) -> Vmm:
        return HostArena(name, math.ceil(size_bytes / page_bytes), page_bytes)  # the kernel zeroes

    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        buffer = (ctypes.c_char * size_bytes).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def page_lock(self, source: memoryview) -> Callable[[], None]:
        return lambda: None  # the processor copies from any memory

    def synchronize(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def cap_torch(self, size_bytes: int) -> None:
        pass

    def used_bytes(self) -> int:
        return 0

    def free_granules(self) -> int | None:
        return None


class CudaDevice:
    """The one card that this process sees (its worker's CUDA_VISIBLE_DEVICES names it)."""

    def __init__(self) -> None:
        from prism_sgl.allocator.cuda_calls import CudaCalls

        self._calls = CudaCalls(torch.cuda.current_device())
        self._calls.limit_stack(_STACK_BYTES)

    def arena(self, name: str, size_bytes: int, page_bytes: int, *, zeroed: bool) -> Vmm:
        from prism_sgl.allocator.vmm_cuda import CudaArena

        return CudaArena(
            name,
            math.ceil(size_bytes / page_bytes),
            page_bytes,
            zeroed=zeroed and not self._gives_zeroed_memory,
            calls=self._calls,
        )

    @functools.cached_property
    def _gives_zeroed_memory(self) -> bool:
        from prism_sgl.allocator.vmm_cuda import gives_zeroed_memory

        scrubbed = gives_zeroed_memory(self._calls, GRANULE_BYTES)
        if not scrubbed:
            log.warning(
                "this driver gives memory out again as it was: every new KV page is filled with zeros"
            )
        return scrubbed

    def bytes_at(self, address: int, size_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_RawBytes(address, size_bytes), device="cuda")

    def page_lock(self, source: memoryview) -> Callable[[], None]:
        from prism_sgl.allocator.vmm_cuda import page_lock

        try:
            return page_lock(self._calls, source)
        except VmmError as error:
            log.warning("%s: every wake of this model will be slow; raise the limit of locked memory", error)
            return lambda: None

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def cap_torch(self, size_bytes: int) -> None:
        total_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size_bytes / total_bytes))

    def used_bytes(self) -> int:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card):
            if process.pid == os.getpid() and process.usedGpuMemory:
                return int(process.usedGpuMemory)
        raise RuntimeError(
            "the driver does not tell what this process holds; run prism_sgl in the host's pid namespace"
        )

    def free_granules(self) -> int | None:
        return int(torch.cuda.mem_get_info()[0]) // GRANULE_BYTES


def open_device(kind: str) -> Device:
    return HostDevice() if kind == "host" else CudaDevice()


class _RawBytes:
    """Raw GPU memory, as torch takes it: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
