"""The tokens are those of transformers, whatever happens to the memory under them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.reference import greedy, tokens_of
from tests.engine.system import System, wait_for

pytestmark = pytest.mark.engine

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small dragon who",
    "def fibonacci(n):",
    "Water boils at a temperature of",
]
MIB = 1 << 20


def ids_of(text: str) -> list[int]:
    return tokens_of(text)


def long_prompt(seed: int, num_tokens: int) -> list[int]:
    """Ordinary token ids that no other prompt begins with."""
    return [(seed * 7919 + i * 104729) % 40000 + 100 for i in range(num_tokens)]


@pytest.mark.parametrize("model", ["chat", "code"])
def test_greedy_tokens_are_those_of_transformers(system: System, model: str) -> None:
    for text in PROMPTS:
        ids = ids_of(text)
        assert system.generate(model, ids, 24)["output_ids"] == greedy(tuple(ids), 24)


@pytest.mark.parametrize("model", ["chat", "code"])
def test_a_prefix_hit_changes_no_token(system: System, model: str) -> None:
    ids = long_prompt(1, 160)
    first = system.generate(model, ids, 16)
    again = system.generate(model, ids, 16)
    assert again["meta_info"]["cached_tokens"] >= 144
    assert first["output_ids"] == again["output_ids"] == greedy(tuple(ids), 16)


@pytest.mark.parametrize("model", ["chat", "code"])
def test_a_chunked_prefill_changes_no_token(system: System, model: str) -> None:
    ids = long_prompt(2, 600)  # three chunks of at most 256
    assert system.generate(model, ids, 16)["output_ids"] == greedy(tuple(ids), 16)


@pytest.mark.parametrize("model", ["chat", "code"])
def test_sleep_gives_all_memory_back_and_wake_changes_no_token(system: System, model: str) -> None:
    ids = ids_of(PROMPTS[1])
    assert system.admin("sleep", model).status_code == 200
    assert system.status(model)["state"] == "asleep"
    assert system.held(model, "weights") == 0
    assert system.held(model, "kv") == 0
    # Held, not refused, while the model wakes.
    assert system.generate(model, ids, 24)["output_ids"] == greedy(tuple(ids), 24)
    assert system.status(model)["state"] == "awake"
    assert system.held(model, "weights") >= 500 * MIB


def test_tokens_hold_while_the_budget_moves_between_two_decoding_models(system: System) -> None:
    """chat fills the memory and decodes; then code wants its share; both go on to their right ends."""
    budget = 1248 * MIB
    samples: list[dict[str, int]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            arenas = system.arenas()
            samples.append(
                {
                    "sum": sum(arenas.values()),
                    "chat": sum(v for k, v in arenas.items() if k.startswith("chat@") and k.endswith("kv")),
                    "code": sum(v for k, v in arenas.items() if k.startswith("code@") and k.endswith("kv")),
                }
            )
            done.wait(0.01)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        jobs = [("chat", long_prompt(10 + i, 200), 160) for i in range(8)]
        with ThreadPoolExecutor(16) as pool:
            chat = [pool.submit(system.generate, *job) for job in jobs]
            wait_for("chat holds most of the memory", lambda: system.held("chat", "kv") > 110 * MIB)
            held_before = system.held("chat", "kv")
            code_jobs = [("code", long_prompt(20 + i, 200), 160) for i in range(8)]
            code = [pool.submit(system.generate, *job) for job in code_jobs]
            answers = [f.result() for f in chat + code]
    finally:
        done.set()
        watcher.join()
    for (_, ids, num_tokens), answer in zip(jobs + code_jobs, answers, strict=True):
        assert answer["output_ids"] == greedy(tuple(ids), num_tokens)
    assert max(s["sum"] for s in samples) <= budget
    later = [s for s in samples if s["code"] > 80 * MIB]
    assert later, "code never got its share"
    assert min(s["chat"] for s in later) < held_before - 16 * MIB
    assert "reclaim: gave" in system.log_text()


@pytest.mark.parametrize("model", ["chat", "code"])
def test_shortage_retracts_and_loses_nothing(system: System, model: str) -> None:
    """Far more than fits at once: requests are retracted or wait, and every one is answered in full."""
    jobs = [(long_prompt(40 + i, 120), 240) for i in range(14)]  # 5,040 tokens, 3,640 fit below the ceiling
    with ThreadPoolExecutor(16) as pool:
        answers = [f.result() for f in [pool.submit(system.generate, model, *job) for job in jobs]]
    for (ids, num_tokens), answer in zip(jobs, answers, strict=True):
        assert len(answer["output_ids"]) == num_tokens
        assert answer["output_ids"][:8] == greedy(tuple(ids), 8)
    assert answers[0]["output_ids"] == greedy(tuple(jobs[0][0]), 240)
