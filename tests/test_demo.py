"""What ``make demo ONCE=1`` looks for in the logs is what the engine says there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_CONVERSION = re.compile(r"%(\.\d)?[dfs]")


def demo_proofs() -> dict[str, re.Pattern[str]]:
    spec = importlib.util.spec_from_file_location("demo_run", ROOT / "demo" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    proofs: dict[str, re.Pattern[str]] = module.PROOFS
    return proofs


def logged() -> list[str]:
    """Every text in the engine's sources with numbers in the place of its conversions."""
    texts = []
    for file in (ROOT / "prism_sgl" / "engine").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(_CONVERSION.sub("12", node.value))
    return texts


@pytest.mark.parametrize("what", ["a sleep", "a wake", "a reclaim by another owner"])
def test_each_proof_is_said(what: str) -> None:
    proof = demo_proofs()[what]
    assert any(proof.search(text) for text in logged())
