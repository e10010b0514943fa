"""Children that load or ask the card without an engine: link speed, a bare context, memory that comes and goes."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu.engine_process import Handler, process_tree, without_pause


class CardHandler(Handler):
    """Verbs: ``context``, ``hold``, ``link``, ``churn``, ``allocate``."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def do_context(self, small_stacks: bool = False) -> list[int]:
        """Make a CUDA context with one tensor in it, and keep it; returns the process ids.

        ``small_stacks``: with the stack for each thread that our engines leave it, instead of CUDA's own.
        """
        import torch

        self._held.append(torch.zeros(1, device="cuda"))
        if small_stacks:
            from prism_sgl.engine.device import CudaDevice

            self._held.append(CudaDevice())
        torch.cuda.synchronize()
        return process_tree()

    def do_hold(self, size_bytes: int) -> None:
        """Take so much of the card away from everybody else, until the process ends."""
        import torch

        self._held.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        torch.cuda.synchronize()

    def do_link(self, mib: int = 1024, copies: int = 24) -> list[float]:
        """Bytes a second of each copy from page-locked host memory to the card, whole block at once."""
        import torch

        source = torch.empty(mib << 20, dtype=torch.uint8, pin_memory=True)
        source.fill_(7)
        target = torch.empty(mib << 20, dtype=torch.uint8, device="cuda")
        rates = []
        for number in range(copies + 2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            if number >= 2:
                rates.append((mib << 20) / (time.perf_counter() - began))
        del source, target
        torch.cuda.empty_cache()
        return rates

    def do_churn(self, page_bytes: int, total_bytes: int, seconds: float) -> dict[str, float]:
        """Map and unmap so many bytes without pause, as the product does it; returns cycles and seconds."""
        from prism_sgl.allocator.vmm_cuda import CudaArena

        num_pages = total_bytes // page_bytes
        arena = CudaArena("churn", num_pages, page_bytes, zeroed=False)

        def cycle() -> None:
            arena.map([range(num_pages)])
            arena.unmap([range(num_pages)])

        try:
            return without_pause(cycle, seconds)
        finally:
            arena.close()

    def do_allocate(self, total_bytes: int, seconds: float) -> dict[str, float]:
        """cudaMalloc and cudaFree of so many bytes without pause, through torch; returns cycles and seconds."""
        import torch

        def cycle() -> None:
            taken = torch.empty(total_bytes, dtype=torch.uint8, device="cuda")
            del taken
            torch.cuda.empty_cache()

        return without_pause(cycle, seconds)
