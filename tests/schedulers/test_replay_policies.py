from __future__ import annotations

from dataclasses import replace

import pytest

from prism_sgl.schedulers.replay import policies
from prism_sgl.schedulers.replay.fixed import split_kv
from prism_sgl.schedulers.replay.outcomes import caught_in_moves, summarise, ttft_s
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, Move, Outcome, Replayed, Slo
from prism_sgl.schedulers.replay.splits import candidates
from tests.schedulers.fleets import COSTS, MIB, fleet, spec, steady


def mixed(*names: str) -> list[Arrival]:
    listed = [a for i, name in enumerate(names) for a in steady(name, 30, 0.3 + i * 0.1)]
    return sorted(listed, key=lambda a: a.at_s)


def play(policy: str, over: Fleet, arrivals: list[Arrival]) -> Replayed:
    return policies.tunings(policy, over, arrivals, check=True)[0].replay(arrivals, lambda done: None)


def slos(over: Fleet) -> dict[str, Slo]:
    return {m.name: m.slo for m in over.models}


@pytest.mark.parametrize("policy", policies.NAMES)
def test_every_policy_answers_a_light_trace(policy: str) -> None:
    over = fleet(spec("a"), spec("b"), devices=2)
    replayed = play(policy, over, mixed("a", "b"))
    summary = summarise(replayed, slos(over))
    assert (summary.requests, summary.failed) == (60, 0)
    assert summary.ttft_p50_s > COSTS.latency_s


@pytest.mark.parametrize("policy", policies.NAMES)
def test_same_inputs_give_the_same_log(policy: str) -> None:
    over = fleet(spec("a"), spec("b"), spec("c"), devices=2)
    arrivals = mixed("a", "b", "c")
    first, second = play(policy, over, arrivals), play(policy, over, arrivals)
    assert first.log == second.log
    assert [o.ended_at for o in first.outcomes] == [o.ended_at for o in second.outcomes]


def test_models_that_cannot_all_be_awake_are_served_by_those_that_may_sleep() -> None:
    over = fleet(spec("a"), spec("b"), spec("c"), device_mib=7400)  # two of three
    arrivals = [Arrival(20.0 * i, name, 100, 20) for i, name in enumerate("abcabc")]
    prism, static = play("prism", over, arrivals), play("static", over, arrivals)
    assert summarise(prism, slos(over)).failed == 0
    assert prism.wakes >= 2
    assert summarise(static, slos(over)).failed == 2


def test_wake_copies_only_what_neighbours_took() -> None:
    """A small model takes 2,348 MiB where 3,148 MiB are given: 200 of the 1,000 MiB of weights stay."""
    over = fleet(
        spec("a"), spec("b"), spec("small", weights_bytes=200 * MIB, floor_bytes=100 * MIB), device_mib=7400
    )
    first = [Arrival(5.0 * i, name, 100, 20) for i, name in enumerate(["a", "small", "b", "small", "a"])]
    whole = [replace(m, costs=replace(m.costs, wake_s=3.0)) for m in over.models]
    replayed = replay_prism(replace(over, models=tuple(whole)), first, check=True)
    waits = [round(ttft_s(o), 2) for o in replayed.outcomes if ttft_s(o) > 0.3]
    assert waits
    assert all(wait_s < 1.0 for wait_s in waits), waits


@pytest.mark.parametrize(("every_s", "most"), [(0.4, 30), (3.0, 60), (0.05, 12)])
def test_models_that_exclude_each_other_do_not_thrash(every_s: float, most: int) -> None:
    """Alternating requests, now and then or without a pause. Two models, each awake for two seconds at least."""
    over = fleet(spec("a"), spec("b"), device_mib=4300)
    arrivals = [Arrival(i * every_s, "ab"[i % 2], 100, 20) for i in range(int(120 / every_s))]
    replayed = play("prism", over, arrivals)
    per_minute = replayed.wakes / 2
    print(f"a request every {every_s} s: {per_minute:.1f} wakes a minute")
    assert 0 < per_minute <= most
    assert summarise(replayed, slos(over)).failed == 0


def test_paper_moves_a_model_off_a_hot_device_and_loses_nothing() -> None:
    over = fleet(spec("a"), spec("b"), spec("c"), spec("d"), devices=2, device_mib=11000)
    hot = [name for name, devices in play("paper", over, []).placement.items() if devices]
    assert hot == ["gpu0", "gpu1"]
    here = play("paper", over, []).placement["gpu0"]
    arrivals = sorted((a for name in here for a in steady(name, 400, 0.1)), key=lambda a: (a.at_s, a.model))
    replayed = play("paper", over, arrivals)
    assert replayed.migrations > 0
    assert all(move.began_at + COSTS.wake_s < move.ended_at < 60.0 for move in replayed.moves)
    summary = summarise(replayed, slos(over))
    assert summary.failed == 0
    assert 0 < summary.moved < summary.requests / 2
    assert summary.ttft_p99_moved_s > 0.0 and summary.ttft_p99_unmoved_s > 0.0


def test_caught_in_a_move_is_who_waited_between_its_begin_and_its_drain() -> None:
    def waited(model: str, arrived_at: float, first_at: float | None) -> Outcome:
        return Outcome(
            model, arrived_at, 10, 10, first_at=first_at, ended_at=None if first_at is None else 99.0
        )

    caught = [waited("a", 0.0, 5.5), waited("a", 5.5, 5.6), waited("a", 5.9, 9.0), waited("a", 4.0, None)]
    free = [waited("a", 0.0, 4.9), waited("a", 6.1, 7.0), waited("b", 5.5, 5.6)]
    moves = [Move("a", 5.0, 6.0)]
    assert caught_in_moves(caught + free, moves) == {id(outcome) for outcome in caught}
    summary = summarise(
        Replayed(caught + free, len(moves), moves=moves), {"a": Slo(1.0, 1.0), "b": Slo(1.0, 1.0)}
    )
    assert (summary.moved, summary.migrations, summary.failed) == (4, 1, 1)
    assert summary.ttft_p99_moved_s == pytest.approx(5.5)
    assert summary.ttft_p99_unmoved_s == pytest.approx(4.9)
    assert caught_in_moves(free, [Move("a", 8.0)]) == set(), "one that never ends catches only who came later"


def test_model_on_two_devices_is_served_by_every_policy() -> None:
    wide = replace(spec("wide"), tp=2)
    over = fleet(wide, spec("a"), devices=2)
    arrivals = mixed("wide", "a")
    for policy in ("prism", "static", "muxserve", "paper", "prototype"):
        assert summarise(play(policy, over, arrivals), slos(over)).failed == 0, policy


def test_static_split_follows_the_rates_and_leaves_each_its_floor() -> None:
    over = fleet(spec("a"), spec("b"))
    kv_bytes = split_kv(over, {"a": (0,), "b": (0,)}, {"a": 100.0, "b": 0.0})
    assert kv_bytes["b"] == COSTS.floor_bytes
    assert kv_bytes["a"] == 600 * MIB  # 7,000 less two models of 3,148 and one floor, in pages of 10


def test_candidates_begin_with_the_even_load() -> None:
    over = fleet(spec("a"), spec("b"), spec("c"), devices=2, device_mib=10000)
    best = candidates(over, {"a": 0.6, "b": 0.3, "c": 0.3}, 2)[0]
    assert best["b"] == best["c"] != best["a"]


def test_failed_request_counts_as_missed() -> None:
    over = fleet(spec("a"))
    replayed = play("muxserve", over, steady("a", 4, 1.0))
    replayed.outcomes[0].ended_at, replayed.outcomes[0].failure = None, "lost"
    summary = summarise(replayed, slos(over))
    assert summary.failed == 1
    assert summary.ttft_attainment == 0.75


def test_candidates_leave_models_out_where_not_all_fit() -> None:
    over = fleet(spec("a"), spec("b"), spec("c"))  # two of three
    found = candidates(over, {"a": 0.1, "b": 0.3, "c": 0.2}, 4)
    assert [sorted(placement) for placement in found] == [["b", "c"], ["b"]]
