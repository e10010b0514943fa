"""Weights move into an arena with every alias of them, and sleep and wake without a bit changed."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.allocator.weights import Image, Layout, WeightsArena
from prism_sgl.engine.device import HostDevice
from prism_sgl.engine.tensors import move_storage, weight_storages

PAGE = 2 << 20


class Tied(torch.nn.Module):
    """An embedding tied to its head, a fused weight with views kept as plain attributes, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 16)
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.fused = torch.nn.Parameter(torch.randn(6, 16))
        self.query = self.fused.data[:2]
        self.parts = [self.fused.data[2:4], self.fused.data.t()]
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids) + self.query.sum(0) + self.parts[0].sum(0) + self.parts[1].sum(1)
        return self.head(hidden + self.table.sum())


def test_aliases_follow_and_waking_restores_every_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    ids = torch.tensor([3, 9, 27])
    before = model(ids).clone()
    groups = weight_storages(model)
    assert [len(g.tensors) for g in groups] == [4, 1]
    path = str(tmp_path / "ledger")
    Ledger.create(path, 8 * PAGE, "host0")
    with Ledger.open(path) as ledger:
        owner = ledger.join("unit", floor=0, ceiling=8, priority=0, bell="")
        layout = Layout.plan([g.nbytes for g in groups])
        device = HostDevice()
        vmm = device.arena("unit:weights", layout.total_bytes, PAGE, zeroed=False)
        arena = WeightsArena(vmm, owner)
        assert arena.materialise(layout.total_bytes)
        for group, offset in zip(groups, layout.offsets, strict=True):
            move_storage(group, device.bytes_at(vmm.base + offset, group.nbytes))
        assert torch.equal(model(ids), before)
        inside = range(vmm.base, vmm.base + vmm.size_bytes)
        assert all(p.data_ptr() in inside for p in model.parameters())
        assert model.query.data_ptr() in inside
        assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
        assert model.table.data_ptr() not in inside
        image = Image.create("unit", vmm.size_bytes)
        with image.writable_view() as view:
            vmm.copy_out(0, view)
        image.seal()
        arena.adopt(image)
        for _ in range(2):
            arena.sleep()
            assert owner.held(Kind.WEIGHTS) == 0
            assert vmm.physical_bytes() == 0
            assert arena.wake()
            assert torch.equal(model(ids), before)
