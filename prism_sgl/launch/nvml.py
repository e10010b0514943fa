"""What the driver says of this machine's cards: how large they are, what is free, and who holds the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds memory of a card."""

    pid: int
    name: str  # "": the driver does not tell it
    used_bytes: int  # 0: likewise


@dataclass(frozen=True, slots=True)
class Card:
    index: int  # by PCI bus, as nvidia-smi counts, among those that we may use, as CUDA counts
    uuid: str
    name: str
    total_bytes: int  # without what the driver keeps for itself
    free_bytes: int
    holders: tuple[Holder, ...] = ()


class NoDriverError(Exception):
    """There is no driver that could be asked, or it does not answer."""


ReadCards = Callable[[], Sequence[Card]]


def read_cards() -> list[Card]:
    """All cards that this process may use. Makes no CUDA context.

    Raises:
        NoDriverError
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDriverError(str(error)) from None
    try:
        return [_read(pynvml, index, handle) for index, handle in enumerate(_usable(pynvml))]
    except pynvml.NVMLError as error:
        raise NoDriverError(str(error)) from None
    finally:
        pynvml.nvmlShutdown()


def _usable(pynvml: Any) -> Iterator[object]:
    for number in range(pynvml.nvmlDeviceGetCount()):
        # Another container's card, or a broken one, must not keep us from those beside it.
        with contextlib.suppress(pynvml.NVMLError_NoPermission, pynvml.NVMLError_GpuIsLost):
            yield pynvml.nvmlDeviceGetHandleByIndex(number)


def _read(pynvml: Any, index: int, handle: object) -> Card:
    # Version 2 tells the driver's own part apart, 0.6 of the 140.4 GiB of an H200; the rest is CUDA's total.
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return Card(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        total_bytes=int(memory.total - memory.reserved),
        free_bytes=int(memory.free),
        holders=_holders(pynvml, handle),
    )


def _holders(pynvml: Any, handle: object) -> tuple[Holder, ...]:
    found: dict[int, Holder] = {}
    for read in (
        pynvml.nvmlDeviceGetComputeRunningProcesses,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        try:
            processes = read(handle)
        except pynvml.NVMLError:
            continue  # some cards and some users are not told; that memory is held is seen all the same
        for process in processes:
            used_bytes = int(process.usedGpuMemory or 0)
            found[process.pid] = Holder(process.pid, _process_name(pynvml, process.pid), used_bytes)
    return tuple(sorted(found.values(), key=lambda holder: -holder.used_bytes))


def _process_name(pynvml: Any, pid: int) -> str:
    try:
        return str(pynvml.nvmlSystemGetProcessName(pid))
    except pynvml.NVMLError:  # it has ended, or lives in another pid namespace
        return ""
