"""The tokens are those of transformers, whatever happens to the memory under them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from prism_sgl.allocator.ledger import Kind
from tests.engine.reference import greedy, greedy_batch, tokens_of
from tests.engine.system import System, cpu_seconds, wait_for

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
    ids = long_prompt(2, 300)  # three chunks of at most 128
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
    budget = 1120 * MIB
    prompts = {
        "chat": [long_prompt(10 + i, 200) for i in range(5)],
        "code": [long_prompt(20 + i, 200) for i in range(5)],
    }
    num_tokens = 64
    samples: list[dict[str, int]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(system.arenas())
            done.wait(0.01)

    def kv_of(arenas: dict[str, int], model: str) -> int:
        return sum(v for k, v in arenas.items() if k.startswith(f"{model}@") and k.endswith("kv"))

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(system.generate, "chat", p, num_tokens) for p in prompts["chat"]]
            wait_for("chat to hold most of the KV", lambda: system.held("chat", "kv") > 56 * MIB)
            futures += [pool.submit(system.generate, "code", p, num_tokens) for p in prompts["code"]]
            answers = [future.result()["output_ids"] for future in futures]
    finally:
        done.set()
        watcher.join()
    expected = [
        tokens
        for model in ("chat", "code")
        for tokens in greedy_batch(tuple(map(tuple, prompts[model])), num_tokens)
    ]
    assert answers == expected
    assert max(sum(arenas.values()) for arenas in samples) <= budget
    before = max(kv_of(arenas, "chat") for arenas in samples)
    later = [arenas for arenas in samples if kv_of(arenas, "code") > 36 * MIB]
    assert later, "code never got its share"
    assert min(kv_of(arenas, "chat") for arenas in later) <= before - 8 * MIB
    assert "reclaim: gave" in system.log_text()


def test_an_idle_engine_sleeps_even_after_its_bell_has_rung(system: System) -> None:
    """chat was asked for memory in the test before; while code works, it must not."""
    scheduler = system.runtime_pids("chat")["scheduler"]
    system.generate("chat", long_prompt(60, 8), 1)
    before_s, began = cpu_seconds(scheduler), time.monotonic()
    system.generate("code", long_prompt(61, 40), 24)
    used_s, took_s = cpu_seconds(scheduler) - before_s, time.monotonic() - began
    assert used_s < 0.25 * took_s, f"{used_s:.2f} s of CPU in {took_s:.2f} s"


def test_an_idle_engine_answers_a_neighbour_at_once(system: System) -> None:
    """Each sleeps in a poll of a second, which the neighbour's bell ends."""
    with ThreadPoolExecutor(4) as pool:  # more KV than chat's floor
        list(pool.map(lambda n: system.generate("chat", long_prompt(65 + n, 200), 4), range(4)))
    waited_s = []
    with system.ledger("host0") as ledger:
        # Below its floor, so that it has a right to what it asks for.
        neighbour = ledger.join("neighbour", floor=ledger.budget, ceiling=ledger.budget, priority=0, bell="")
        try:
            for _ in range(4):
                time.sleep(0.1)  # they are in their polls again
                # The page that came before may have been of more than a granule.
                assert neighbour.try_reserve(Kind.KV, ledger.totals().free)
                began = time.monotonic()
                assert neighbour.post_targets(1, 5.0), "both are above their floors"
                wait_for("a granule", lambda: neighbour.try_reserve(Kind.KV, 1), every_s=0.001)
                waited_s.append(time.monotonic() - began)
        finally:
            neighbour.release(Kind.KV, neighbour.held(Kind.KV))
            neighbour.leave()
    assert sum(waited_s) < 1.0, f"polls alone take 3.6 s; this took {waited_s}"


def test_shortage_retracts_and_loses_nothing(system: System) -> None:
    """More than fits below the ceiling is admitted; some are retracted, and every one is answered in full."""
    prompts = [long_prompt(40 + i, 40) for i in range(12)]  # 1,560 tokens in the end, 1,456 fit
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(system.generate, "chat", prompt, 90) for prompt in prompts]
        answers = [future.result()["output_ids"] for future in futures]
    assert answers == greedy_batch(tuple(map(tuple, prompts)), 90)
    assert "Retract requests" in system.log_text()
