"""The models that are measured: random weights of real geometries, in host memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.results import ROOT
from benchmarks.gpu.session import say

MODELS_DIR = Path(os.environ.get("PRISM_BENCH_MODELS", "/dev/shm/models"))
KV_BYTES_PER_TOKEN = {"llama8b": 32 * 2 * 8 * 128 * 2, "llama1b": 16 * 2 * 8 * 64 * 2}


def ensure_models(*names: str) -> list[Path]:
    """Random-weight model folders in /dev/shm, made once, one process each (25 to 50 s for the 8B)."""
    makers = {}
    for name in dict.fromkeys(names):
        if not (MODELS_DIR / name / "model.safetensors.index.json").exists():  # written last
            say(f"making {name} in {MODELS_DIR}")
            maker = ROOT / "demo/random_model.py"
            makers[name] = subprocess.Popen([sys.executable, str(maker), f"{name}:{MODELS_DIR / name}"])
    for name, making in makers.items():
        if making.wait() != 0:
            raise SystemExit(f"demo/random_model.py {name} failed")
    return [MODELS_DIR / name for name in names]
