"""A forward pass that begins while the weights still arrive: each layer waits on the card for its own bytes.

Wake maps the pages, starts the copies and returns; nothing on the processor waits for them. An eager prefill then
runs layer by layer behind the copy, so that its first token comes about when the last byte does. A CUDA graph
is one piece, so it waits for everything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from prism_sgl.allocator.vmm import Vmm

log = logging.getLogger(__name__)


class Arrival:
    """Knows which layer needs the arena up to which byte; hooks the layers while a copy is under way.

    Invariant: the hooks are there only between ``begin`` and the look that finds the copies done, because a hook
    costs every eager pass.
    """

    def __init__(self, model: torch.nn.Module, vmm: Vmm) -> None:
        self._vmm = vmm
        self._layers = _decoder_layers(model)
        self._ends = [_end_in_arena(layer, vmm) for layer in self._layers]
        if self._ends:
            # What follows the layers (norm, head) is read outside of modules: it belongs to the last one.
            self._ends[-1] = vmm.size_bytes
        self._begin_of_layers = min(
            (_begin_in_arena(layer, vmm) for layer in self._layers), default=vmm.size_bytes
        )
        self._hooks: list[Any] = []
        self._began_at = 0.0

    @property
    def under_way(self) -> bool:
        return bool(self._began_at)

    def begin(self) -> None:
        """Copies have just been started."""
        self._began_at = time.perf_counter()
        self._hooks = [
            layer.register_forward_pre_hook(self._waits_for(end))
            for layer, end in zip(self._layers, self._ends, strict=True)
        ]

    def look(self) -> None:
        """At safe points: take the hooks away once everything is there."""
        if self.under_way and self._vmm.is_settled():
            log.info("wake: all weights are there after %.3f s", time.perf_counter() - self._began_at)
            self._end()

    def wait(self) -> None:
        """Until everything is there."""
        self._vmm.settle()
        self.look()

    def before_pass(self, *, eager: bool) -> None:
        """The pass that comes next on the current stream: ``eager`` if it calls the layers one by one."""
        end = self._begin_of_layers if eager else self._vmm.size_bytes
        self._vmm.hold_back(torch.cuda.current_stream().cuda_stream, end)

    def _waits_for(self, end: int) -> Callable[..., None]:
        def wait(*_: Any) -> None:
            self._vmm.hold_back(torch.cuda.current_stream().cuda_stream, end)

        return wait

    def _end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._began_at = 0.0


def _decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The longest list of modules in the model."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def _spans(layer: torch.nn.Module, vmm: Vmm) -> list[tuple[int, int]]:
    """(first, last + 1) byte in the arena of each parameter; others live elsewhere and are always there."""
    spans = []
    for parameter in layer.parameters():
        first = parameter.untyped_storage().data_ptr() - vmm.base
        if 0 <= first < vmm.size_bytes:
            spans.append((first, first + parameter.untyped_storage().nbytes()))
    return spans


def _begin_in_arena(layer: torch.nn.Module, vmm: Vmm) -> int:
    return min((first for first, _ in _spans(layer, vmm)), default=vmm.size_bytes)


def _end_in_arena(layer: torch.nn.Module, vmm: Vmm) -> int:
    return max((end for _, end in _spans(layer, vmm)), default=0)
