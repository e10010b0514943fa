"""The dispatch window, with engines that batch as real ones do: no throughput is lost, and urgent requests gain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prism_sgl.config import SchedulerConfig
from prism_sgl.schedulers import grants
from prism_sgl.schedulers.replay.outcomes import ttft_s
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, Outcome, Slo
from tests.schedulers.fleets import fleet, spec

NO_WINDOW = 10**6


def replay(world: Fleet, arrivals: list[Arrival], *, count: int = 4) -> list[Outcome]:
    limits = SchedulerConfig(start_parallel=8, prefill_window=count)
    outcomes = replay_prism(world, sorted(arrivals, key=lambda a: a.at_s), scheduler=limits).outcomes
    assert all(outcome.ended_at is not None for outcome in outcomes)
    return outcomes


def end_s(outcomes: list[Outcome]) -> float:
    return max(outcome.ended_at or 0.0 for outcome in outcomes)


def mean_ttft_s(outcomes: list[Outcome]) -> float:
    return sum(map(ttft_s, outcomes)) / len(outcomes)


# 64 short prompts at once, every two seconds: one pass of 36 ms would take them all.
BURSTS = [Arrival(2.0 * burst, "chat", 40, 20) for burst in range(20) for _ in range(64)]
# Prompts without a pause, 40 s of prefill: 400 of 1000 tokens at once.
FLOOD = [Arrival(0.0, "batch", 990, 5) for _ in range(400)]
CHATS = [Arrival(1.0 + 0.25 * number, "chat", 40, 5) for number in range(120)]


def test_short_prompts_fill_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    world = fleet(spec("chat", max_running=128, prefill_s_per_token=1e-5, step_s_per_request=1e-5))
    with_window, without = replay(world, BURSTS), replay(world, BURSTS, count=NO_WINDOW)
    monkeypatch.setattr(grants, "WINDOW_US", 0)
    by_count = replay(world, BURSTS)
    print(f"mean TTFT: {[round(mean_ttft_s(o), 3) for o in (with_window, without, by_count)]}")
    assert mean_ttft_s(with_window) < 1.15 * mean_ttft_s(without)
    assert mean_ttft_s(by_count) > 2 * mean_ttft_s(without)


def test_long_prompts_lose_little_throughput() -> None:
    """Four prompts of 0.1 s share a pass where eight could."""
    world = fleet(spec("batch", max_running=32))
    with_window, without = end_s(replay(world, FLOOD)), end_s(replay(world, FLOOD, count=NO_WINDOW))
    print(f"400 prompts of 990 tokens: {with_window:.1f} s, without a window {without:.1f} s")
    assert with_window < 1.04 * without


def test_what_can_be_in_time_passes_a_flood_that_cannot() -> None:
    """In the router's queue; an engine that is given the whole flood serves it as it came. Before a chat stand a pass
    of 0.4 s that has begun, and its own, which takes some of the flood along."""
    world = fleet(replace(spec("batch", max_running=64), slo=Slo(1.0, 0.05)))
    arrivals = FLOOD + [replace(chat, model="batch") for chat in CHATS]
    shares = []
    for count in (4, NO_WINDOW):
        chats = [outcome for outcome in replay(world, arrivals, count=count) if outcome.prompt_tokens == 40]
        shares.append(sum(ttft_s(chat) <= 1.0 for chat in chats) / len(chats))
    print(f"chats in time beside the flood: {shares[0]:.0%}, without a window {shares[1]:.0%}")
    assert shares[0] > 0.8
    assert shares[1] < 0.3


def test_an_idle_engine_gets_its_request_though_another_fills_the_window() -> None:
    world = fleet(spec("batch", max_running=64), spec("chat"), device_mib=14000)  # KV for both
    chats = [outcome for outcome in replay(world, FLOOD + CHATS) if outcome.model == "chat"]
    assert max(map(ttft_s, chats)) < 0.1
