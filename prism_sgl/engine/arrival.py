"""A forward pass that begins while the weights still arrive: each layer waits on the card for its own bytes.

Wake maps the pages, starts the copies and returns; nothing on the processor waits for them. An eager prefill then
runs layer by layer behind the copy, so that its first token comes about when the last byte does. A CUDA graph
is one piece, so it waits for everything, and so does a model whose weights may be read in another order than they
arrive in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from prism_sgl.allocator.vmm import Vmm

log = logging.getLogger(__name__)

# SGLang's names of the final norm and of heads: nobody reads those before the last layer. Only known names, for what
# else is registered after the layers may be read first: the vision tower of srt/models/qwen2_5_vl.py, or the
# embeddings for each layer of gemma3n_causal.py, which stand beside the layers as a final norm does.
_READ_LAST = (
    "norm",
    "norm_f",
    "ln_f",
    "final_norm",
    "final_layernorm",
    "lm_head",
    "output",
    "output_layer",
    "score",
    "classification_head",
)


class Arrival:
    """Knows which layer needs the arena up to which byte; hooks the layers while a copy is under way.

    Invariant: the hooks are there only between ``begin`` and the look that finds the copies done, because a hook
    costs every eager pass.
    """

    def __init__(self, model: torch.nn.Module, vmm: Vmm) -> None:
        self._vmm = vmm
        path, layers = _decoder_layers(model)
        begin = min((_begin_in_arena(layer, vmm) for layer in layers), default=vmm.size_bytes)
        other = _may_be_read_early(model, path, begin, vmm)
        if other or not layers:
            # Read before any layer, perhaps outside of modules, where no hook can wait: the pass waits for everything.
            layers, begin = [], vmm.size_bytes
            reason = f"{other} follows the first layer" if other else "no list of layers uses the KV cache"
            log.info("after a wake, prefills wait for all weights: %s", reason)
        self._layers = layers
        self._begin_of_layers = begin
        self._ends = [_end_in_arena(layer, vmm) for layer in layers]
        if self._ends:
            # What follows the layers (norm, head) is read outside of modules: it belongs to the last one.
            self._ends[-1] = vmm.size_bytes
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


def _decoder_layers(model: torch.nn.Module) -> tuple[str, list[torch.nn.Module]]:
    """The longest list of modules with attention over the KV cache, and its path.

    Every pass runs these, while one without an image leaves a vision tower out, and would not wait there.
    """
    found: tuple[str, list[torch.nn.Module]] = ("", [])
    for path, module in model.named_modules():
        uses_kv = any(isinstance(part, RadixAttention) for part in module.modules())
        if isinstance(module, torch.nn.ModuleList) and uses_kv and len(module) > len(found[1]):
            found = (path, list(module))
    return found


def _may_be_read_early(model: torch.nn.Module, layers: str, begin: int, vmm: Vmm) -> str | None:
    """The first parameter outside the layers that lies behind ``begin`` and is not known to be read after all of them.

    ``layers`` is the path of the list. What is read last stands beside it, or beside a module around it.
    """
    around = layers.split(".")[:-1]
    later = [[*around[:depth], name] for depth in range(len(around) + 1) for name in _READ_LAST]
    known = tuple(f"{path}." for path in (layers, *map(".".join, later)))
    # Under each of its names: a head that is the embedding too is read first.
    for path, module in model.named_modules(remove_duplicate=False):
        if not f"{path}.".startswith(known):
            for name, parameter in module.named_parameters(path, recurse=False):
                if any(end > begin for _, end in _spans([parameter], vmm)):
                    return str(name)
    return None


def _spans(parameters: Iterable[torch.nn.Parameter], vmm: Vmm) -> list[tuple[int, int]]:
    """(first, last + 1) byte in the arena of each storage; others live elsewhere and are always there."""
    spans = []
    for parameter in parameters:
        storage = parameter.untyped_storage()
        first = storage.data_ptr() - vmm.base
        if 0 <= first < vmm.size_bytes:
            spans.append((first, first + storage.nbytes()))
    return spans


def _begin_in_arena(layer: torch.nn.Module, vmm: Vmm) -> int:
    return min((first for first, _ in _spans(layer.parameters(), vmm)), default=vmm.size_bytes)


def _end_in_arena(layer: torch.nn.Module, vmm: Vmm) -> int:
    return max((end for _, end in _spans(layer.parameters(), vmm)), default=0)
