"""Beside pages: how much torch may take of a card, and what the launcher is told of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prism_sgl.config_cards import card_id
from prism_sgl.launch.nvml import read_cards

torch = pytest.importorskip("torch")

CAPPED = """
import torch
from prism_sgl.engine.device import CudaDevice
device = CudaDevice()
torch.zeros(1, device="cuda")
device.cap_torch(1 << 30)
try:
    torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("refused")
device.cap_torch(3 << 30)
torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
print("allowed")
"""


def test_torch_takes_no_more_than_its_cap_and_a_cap_can_be_raised() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CAPPED], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["refused", "allowed"]


def test_the_launcher_sees_the_memory_that_cuda_sees() -> None:
    wanted = card_id(0, os.environ)
    card = next(card for card in read_cards() if wanted in (str(card.index), card.uuid))
    free, total = torch.cuda.mem_get_info()
    assert card.total_bytes == total
    assert abs(card.free_bytes - free) < 1 << 30
