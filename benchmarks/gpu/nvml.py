"""What the driver says of the card: its name, and who holds how much of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_sgl.config_cards import card_id

GIB = 1 << 30

MIB = 1 << 20


@dataclass(frozen=True)
class CardInfo:
    name: str
    driver: str
    total_bytes: int


def card_info() -> CardInfo:
    """Of the first card that CUDA shows us; "no card" where there is none, so that scripts can be tried without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        card = _first_card(pynvml)
        return CardInfo(
            name=_text(pynvml.nvmlDeviceGetName(card)),
            driver=_text(pynvml.nvmlSystemGetDriverVersion()),
            total_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(card).total),
        )
    except Exception as error:  # pynvml missing, no driver: NVML's classes are not importable then
        return CardInfo(f"no card ({type(error).__name__})", "", 80 * GIB)


def card_used_mib() -> float:
    """What the whole card holds now."""
    import pynvml

    pynvml.nvmlInit()
    return float(pynvml.nvmlDeviceGetMemoryInfo(_first_card(pynvml)).used) / MIB


def process_mib(pids: Sequence[int] | None = None) -> dict[int, float]:
    """MiB on the card of each process (of ``pids``), as the driver counts them."""
    import pynvml

    pynvml.nvmlInit()
    card = _first_card(pynvml)
    found = {
        int(process.pid): (process.usedGpuMemory or 0) / MIB
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    }
    return found if pids is None else {pid: mib for pid, mib in found.items() if pid in pids}


def settled_mib(read: Callable[[], float], seconds: float = 1.0) -> float:
    """A reading that stayed the same for 0.2 s; the driver gives memory back a little later."""
    deadline = time.monotonic() + seconds
    before = read()
    while True:
        time.sleep(0.2)
        now = read()
        if now == before or time.monotonic() > deadline:
            return now
        before = now


def _first_card(pynvml: Any) -> Any:
    """Two scripts may run side by side on a machine with two cards, each with a CUDA_VISIBLE_DEVICES of its own."""
    wanted = card_id(0, os.environ)
    if wanted.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(wanted))
    return pynvml.nvmlDeviceGetHandleByUUID(wanted)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
