"""After SGLang has loaded a model: move its weights into the arena, and keep their image in the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from prism_sgl.allocator.weights import Layout, WeightsArena
from prism_sgl.engine.arrival import Arrival
from prism_sgl.engine.image_client import ImageMemory, fetch_image, image_key, image_source, is_image_known
from prism_sgl.engine.runtime_memory import START_TIMEOUT_S, RuntimeMemory, ShortageError
from prism_sgl.engine.tensors import StorageGroup, move_storage, weight_storages
from prism_sgl.units import round_up

log = logging.getLogger(__name__)

# The model moves in steps of about this size, so that no more than this is held twice.
_STEP_BYTES = 1 << 30


def hold_weights(model: torch.nn.Module, server_args: Any, free_memory: ImageMemory) -> None:
    """Lay the model's parameters out in this runtime's arena, and keep their image in the store.

    Raises:
        ShortageError: the budget had no room within the start timeout.
    """
    memory = RuntimeMemory.current()
    spec = memory.spec
    groups = weight_storages(model)
    layout = Layout.plan([group.nbytes for group in groups])
    vmm = memory.weights_arena(layout.total_bytes)
    arena = memory.weights = WeightsArena(vmm, memory.owner)
    began = time.perf_counter()
    _move(memory, arena, groups, layout)
    moved = time.perf_counter()
    key = image_key(_source(memory, server_args), [group.nbytes for group in groups])
    image = fetch_image(
        spec.run_dir, key, vmm.size_bytes, spec.model, free_memory, lambda view: vmm.copy_out(0, view)
    )
    copied = time.perf_counter()
    arena.adopt(image)
    image.page_lock(memory.device.page_lock)  # its maker has done so while the model loaded
    memory.arrival = Arrival(model, vmm)
    log.info(
        "%s: %d storages, %.1f MiB, in the arena in %.2f s, image in %.2f s, page-locked in %.2f s",
        spec.model,
        len(groups),
        layout.total_bytes / 2**20,
        moved - began,
        copied - moved,
        time.perf_counter() - copied,
    )


def image_memory(server_args: Any) -> ImageMemory:
    """Made before the model loads, where nobody has its image yet: a second copy may be more than the host has."""
    memory = RuntimeMemory.current()
    spec = memory.spec
    is_known = is_image_known(spec.run_dir, _source(memory, server_args))
    if is_known:
        log.info("%s: host memory has an image of its weights already", spec.model)
    size_bytes = 0 if is_known else round_up(spec.weights_bytes, spec.weights_page_bytes)
    return ImageMemory(spec.model, size_bytes, memory.device.page_lock)


def _source(memory: RuntimeMemory, server_args: Any) -> str:
    return image_source(
        memory.spec.path, dtype=str(server_args.dtype), quantization=server_args.quantization, rank=0
    )


def _move(memory: RuntimeMemory, arena: WeightsArena, groups: list[StorageGroup], layout: Layout) -> None:
    """Storage by storage into the arena; what the engine's own copies held goes back step by step."""
    base = arena.vmm.base
    for step in _steps(layout):
        end = layout.total_bytes if step.stop == len(groups) else layout.offsets[step.stop]
        materialise, unmapped_bytes = partial(arena.materialise, end), partial(arena.unmapped_bytes, end)
        if memory.insist(materialise, unmapped_bytes, START_TIMEOUT_S) is None:
            raise ShortageError(
                f"{memory.spec.model}: no room for {arena.vmm.size_bytes >> 20} MiB of weights on "
                f"{memory.spec.device} within {START_TIMEOUT_S:.0f} s{memory.who_is_in_the_way()}"
            )
        for index in step:
            group = groups[index]
            move_storage(group, memory.device.bytes_at(base + layout.offsets[index], group.nbytes))
        memory.device.synchronize()
        memory.device.trim()
        memory.overhead.settle(0)


def _steps(layout: Layout) -> Iterator[range]:
    """Neighbouring storages of about ``_STEP_BYTES`` together."""
    start = 0
    for index, offset in enumerate(layout.offsets):
        if offset - layout.offsets[start] >= _STEP_BYTES:
            yield range(start, index)
            start = index
    yield range(start, len(layout.offsets))
