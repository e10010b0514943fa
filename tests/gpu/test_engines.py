"""An elastic engine answers as plain SGLang does: alone, after sleep and wake in every degree, far out in its range."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.gpu.card import Neighbour
from benchmarks.gpu.children import SLEEP, SLEEP_KEEPING_WEIGHTS, WAKE, WAKE_AND_WAIT
from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.nvml import GIB
from tests.gpu.conftest import Pair, answers

# Fills what is free of the card with NaN, page by page like an engine's KV, and gives it back.
POISON = """
import torch
from prism_sgl.allocator.vmm_cuda import CudaArena
PAGE = 64 << 20
torch.zeros(1, device="cuda")
pages = (torch.cuda.mem_get_info()[0] - (1 << 30)) // PAGE
arena = CudaArena("poison", pages, PAGE, zeroed=False)
nan = memoryview(bytes([0xFF]) * PAGE)
arena.map([range(pages)])
for page in range(pages):
    arena.copy_in(page * PAGE, nan)
arena.settle()
arena.close()
"""


STRANGER = """
import time, torch
torch.zeros(1, device="cuda")
held = torch.empty(torch.cuda.mem_get_info()[0] - (1 << 30), dtype=torch.uint8, device="cuda")
print("full", flush=True)
time.sleep(3)
"""


def test_tokens_equal_plain_sglang(pair: Pair) -> None:
    assert answers(pair.ours) == answers(pair.stock)


@pytest.mark.parametrize(
    ("sleep", "wake"),
    [(SLEEP, WAKE_AND_WAIT), (SLEEP, WAKE), (SLEEP_KEEPING_WEIGHTS, WAKE)],
    ids=["all", "all, arriving", "nothing lost"],
)
def test_sleep_and_wake_change_no_token(pair: Pair, sleep: dict, wake: dict) -> None:
    before = answers(pair.ours)
    awake = pair.held()
    pair.ours.act(sleep)
    asleep = pair.held()
    assert asleep["kv"] == 0
    assert asleep["weights"] == (0 if sleep is SLEEP else awake["weights"])
    assert asleep["overhead"] < awake["overhead"]
    # The next request is sent at once: where the weights still arrive, its layers wait for them.
    first = pair.ours.act_then_generate(wake, Ask(seed=100, tokens=3, new_tokens=24))
    assert first["answer"]["ids"] == before[0]
    assert answers(pair.ours) == before
    assert pair.held()["weights"] == awake["weights"]


@pytest.mark.parametrize("pair", ["fa3"], indirect=True)
def test_a_sleeper_gives_only_what_a_neighbour_needs(pair: Pair) -> None:
    before = answers(pair.ours)
    weights = pair.held()["weights"]
    pair.ours.act(SLEEP_KEEPING_WEIGHTS)
    neighbour = Neighbour(pair.card)
    neighbour.take(neighbour.free_bytes() + GIB)
    left = pair.held()["weights"]
    assert 0 < weights - left <= GIB // (2 << 20) + 64, "one GiB was wanted, in pages of 128 MiB"
    neighbour.give_back()
    pair.ours.act(WAKE)
    assert answers(pair.ours) == before


def test_poisoned_memory_reaches_no_answer(pair: Pair) -> None:
    before = answers(pair.ours)
    pair.ours.act(SLEEP)
    subprocess.run([sys.executable, "-c", POISON], check=True, timeout=120)
    pair.ours.act(WAKE)
    assert answers(pair.ours) == before


@pytest.mark.parametrize("pair", ["triton-blocks"], indirect=True)
def test_memory_taken_outside_the_ledger_is_waited_for(pair: Pair) -> None:
    """Requests wait while a stranger holds the card, and are answered when it has gone."""
    before = answers(pair.ours)
    pair.ours.act(SLEEP)
    pair.ours.act(WAKE_AND_WAIT)
    mark = pair.ours.log_mark()
    stranger = subprocess.Popen([sys.executable, "-c", STRANGER], stdout=subprocess.PIPE)
    assert stranger.stdout is not None
    assert stranger.stdout.readline() == b"full\n"
    # More than the pages that the wake has mapped: they wait until the stranger has gone, three seconds later.
    many = [Ask(seed=9000 + n, tokens=3000, new_tokens=8) for n in range(16)]
    burst = pair.ours.burst(many)
    assert not burst.errors
    stranger.wait(30)
    said = pair.ours.log_matches(r"(another process holds it)", mark)
    assert len(said) == 1
    assert pair.ours.log_matches(r"(has memory for waiting requests again)", mark)
    assert answers(pair.ours) == before


@pytest.mark.parametrize("pair", ["fa3"], indirect=True)
def test_slots_beyond_int32_elements(pair: Pair) -> None:
    """A full prefix cache holds the low slots; new prompts lie beyond 2^31 numbers from the arena's begin."""
    pair.ours.act({"name": "flush_cache"})
    fill = [Ask(seed=5000 + n, tokens=3900, new_tokens=1) for n in range(36)]
    assert not pair.ours.burst(fill).errors
    assert pair.held()["kv"] * (2 << 20) > 131_072 * 32_768
    # Nothing of them is cached at either: a prefill in one piece, and one behind a cached prefix, round differently.
    fresh = [Ask(seed=6000 + n, tokens=tokens, new_tokens=24) for n, tokens in enumerate((3, 60, 700, 3000))]
    ours, stock = (engine.burst(fresh, keep_ids=True, one_by_one=True) for engine in (pair.ours, pair.stock))
    assert not ours.errors and not any(answer["cached"] for answer in ours.answers)
    assert ours.ids == stock.ids
