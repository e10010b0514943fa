"""Engines on a real card, ours beside plain SGLang with the same flags; all start at once, for a start takes a minute.

Run on a machine with a card: ``pytest -m gpu tests/gpu``. Elsewhere these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.card import Card
from benchmarks.gpu.children import Engine, wait_all
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.models import ensure_models
from benchmarks.gpu.nvml import GIB, card_info

# What serves tokens in different ways; one pair of engines each.
CASES: dict[str, dict[str, Any]] = {
    "fa3": {"attention_backend": "fa3"},
    "fa3-blocks-fp8kv": {"attention_backend": "fa3", "page_size": 64, "kv_cache_dtype": "fp8_e4m3"},
    "triton-blocks": {"attention_backend": "triton", "page_size": 16},
    "flashinfer": {"attention_backend": "flashinfer"},
    "fp8-weights": {"attention_backend": "fa3", "quantization": "fp8"},
}
STOCK_TOKENS = 40_000
# Ranges beyond 2^31 elements: 131,072 tokens of 16,384 numbers, of two bytes or (fp8) of one.
KV_BYTES = {"fa3": 6 * GIB, "triton-blocks": 6 * GIB, "flashinfer": 6 * GIB, "fa3-blocks-fp8kv": 3 * GIB}
# Of the elastic engines. They never need all of it at once; plain SGLang's take 20 GiB beside.
BUDGET_BYTES = (90 if card_info().total_bytes > 100 * GIB else 52) * GIB

PROMPTS = [Ask(seed=100 + n, tokens=length, new_tokens=24) for n, length in enumerate((3, 60, 700, 3000))]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_card = shutil.which("nvidia-smi") is None
    for item in items:
        if "tests/gpu" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(500))
            if no_card:
                item.add_marker(pytest.mark.skip(reason="no CUDA card"))


def why_not(case: str) -> str | None:
    """What the machine lacks for this case."""
    package = importlib.util.find_spec("flashinfer")
    if case == "flashinfer" and package is not None and package.origin is not None:
        data = Path(package.origin).parent / "data"
        headers = data / "cutlass/tools/util/include/cutlass/util/command_line.h"
        if not (data / "aot").exists() and not headers.exists():
            return f"flashinfer cannot compile its kernels here: {headers} is missing"
    return None


@dataclass
class Pair:
    ours: Engine
    stock: Engine
    card: Card

    def others_can_give(self) -> int:
        """Granules that a neighbour gets from the other engines before it needs ours, which was busy last."""
        owners = self.card.ledger.owners()
        return sum(o.reclaimable for o in owners if not o.name.startswith(f"{self.ours.name}@"))

    def held(self) -> dict[str, int]:
        """Granules of ours in the ledger."""
        owner = self.card.owner(self.ours)
        return {"weights": owner.weights, "kv": owner.kv, "overhead": owner.overhead}


def answers(engine: Engine) -> list[list[int]]:
    """Greedy tokens, one request after the other and nothing cached: the same batches each time."""
    return engine.greedy(PROMPTS)


@pytest.fixture(scope="session")
def pairs(request: pytest.FixtureRequest) -> Iterator[dict[str, Pair]]:
    """Those that the chosen tests ask for."""
    (model,) = ensure_models("llama1b")
    wanted = {item.callspec.params.get("pair") for item in request.session.items if hasattr(item, "callspec")}
    with Card(BUDGET_BYTES) as card:
        pairs = {}
        for name, flags in CASES.items():
            if name not in wanted or why_not(name):
                continue
            shared = {"max_running_requests": 32, "cuda_graph_max_bs_decode": 16, **flags}
            ours = card.ours(f"{name}-ours", model, ceiling_bytes=KV_BYTES.get(name, 2 * GIB), **shared)
            stock = card.stock(f"{name}-stock", model, max_total_tokens=STOCK_TOKENS, **shared)
            pairs[name] = Pair(ours, stock, card)
        wait_all([engine for pair in pairs.values() for engine in (pair.ours, pair.stock)], 300)
        yield pairs


@pytest.fixture(params=CASES)
def pair(pairs: dict[str, Pair], request: pytest.FixtureRequest) -> Pair:
    if reason := why_not(request.param):
        pytest.skip(reason)
    return pairs[request.param]
