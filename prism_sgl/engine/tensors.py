"""A loaded model's weights, moved into one arena range so that they can sleep and wake as a whole.

SGLang has created the parameters wherever its loader wanted. We lay their storages out one behind the other in
load order (so the last layers stand last), copy, and rebind every tensor that looks into them, aliases and
tied weights kept. It happens before pools and graphs are made, so everything later bakes our addresses in
(SGLang's own precedent is srt/weight_cache/ipc_loader.py:287).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class StorageGroup:
    """One storage and all tensors of the model that are views of it."""

    nbytes: int
    tensors: list[torch.Tensor] = field(default_factory=list)


def weight_storages(model: torch.nn.Module) -> list[StorageGroup]:
    """The distinct storages of all parameters, in order of first use, with every alias of each.

    Buffers stay where they are: some change at run time, and together they are small (rotary tables).
    """
    groups: dict[int, StorageGroup] = {}
    for parameter in model.parameters():
        storage = parameter.untyped_storage()
        if storage.nbytes():
            groups.setdefault(storage.data_ptr(), StorageGroup(storage.nbytes()))
    for tensor in _all_tensors(model):
        group = groups.get(tensor.untyped_storage().data_ptr())
        if group is not None and not any(t is tensor for t in group.tensors):
            group.tensors.append(tensor)
    return list(groups.values())


def move_storage(group: StorageGroup, target: torch.Tensor) -> None:
    """Copy the storage into ``target`` (uint8 ``[nbytes]``) and make all its tensors views of that."""
    first = group.tensors[0]
    source = torch.empty(0, dtype=torch.uint8, device=first.device)
    source.set_(first.untyped_storage())
    target.copy_(source)
    del source
    for tensor in group.tensors:
        size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        tensor.data = target.view(tensor.dtype).as_strided(size, stride, offset)


def _all_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        # Plain attributes too: some layers keep transposed or sliced views of their own weights.
        yield from (value for value in _values(module) if isinstance(value, torch.Tensor))


def _values(module: torch.nn.Module) -> Iterator[Any]:
    for value in vars(module).values():
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
