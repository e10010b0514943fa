"""After SGLang has loaded a model: refuse what cannot run elastically, move its weights into the arena."""

from __future__ import annotations

import ctypes
import logging
import time
from typing import Any

import torch

from prism_sgl.allocator.weights import Layout, WeightsArena
from prism_sgl.engine.image_client import fetch_image, image_key
from prism_sgl.engine.kv_pool import bytes_at
from prism_sgl.engine.runtime_memory import START_TIMEOUT_S, RuntimeMemory, ShortageError
from prism_sgl.engine.tensors import StorageGroup, move_storage, weight_storages

log = logging.getLogger(__name__)


def hold_weights(model: torch.nn.Module, server_args: Any) -> None:
    """Lay the model's parameters out in this runtime's arena, and keep their image in the store.

    Peak: the engine's own copy stands beside the arena until each storage is rebound, one by one.

    Raises:
        ShortageError: the budget had no room within the start timeout.
    """
    memory = RuntimeMemory.current()
    spec = memory.spec
    groups = weight_storages(model)
    layout = Layout.plan([group.nbytes for group in groups])
    vmm = memory.arena("weights", layout.total_bytes, spec.weights_page_bytes)
    arena = WeightsArena(vmm, memory.owner)
    if memory.insist(arena.materialise, vmm.size_bytes, START_TIMEOUT_S) is None:
        raise ShortageError(
            f"{spec.model}: no room for {vmm.size_bytes >> 20} MiB of weights on {spec.device} "
            f"within {START_TIMEOUT_S:.0f} s"
        )
    began = time.perf_counter()
    _move(groups, layout, vmm.base)
    key = image_key(
        spec.path,
        dtype=str(server_args.dtype),
        quantization=server_args.quantization,
        rank=0,
        sizes_bytes=[group.nbytes for group in groups],
    )
    arena.adopt(
        fetch_image(spec.run_dir, key, vmm.size_bytes, spec.model, lambda view: _copy_out(vmm.base, view))
    )
    memory.weights = arena
    log.info(
        "%s: %d storages, %.1f MiB, in the arena and its image in %.2f s",
        spec.model,
        len(groups),
        layout.total_bytes / 2**20,
        time.perf_counter() - began,
    )


def _move(groups: list[StorageGroup], layout: Layout, base: int) -> None:
    for group, offset in zip(groups, layout.offsets, strict=True):
        move_storage(group, bytes_at(base + offset, group.nbytes))


def _copy_out(base: int, view: memoryview) -> None:
    target = (ctypes.c_char * len(view)).from_buffer(view)
    ctypes.memmove(target, base, len(view))
    del target  # the export must end before the view can be released
