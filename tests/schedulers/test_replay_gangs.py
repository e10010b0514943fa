"""Models over several devices, part by part under the Controller."""

from __future__ import annotations

from dataclasses import replace

from prism_sgl.messages import RequestId, RequestKey
from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Device, HeapClock
from prism_sgl.schedulers.replay.outcomes import summarise, ttft_s
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spanning import Gang, place
from prism_sgl.schedulers.replay.spec import Arrival, ModelSpec
from tests.schedulers.fleets import fleet, spec, steady


def wide(name: str, tp: int = 2) -> ModelSpec:
    return replace(spec(name), tp=tp)


def test_parts_of_two_models_share_all_their_devices_or_none() -> None:
    placed = place([wide("a"), wide("b"), wide("c"), wide("d", 4)], 5, 10**12)
    assert placed == {"a": (0, 1), "b": (2, 3), "c": (0, 1), "d": (0, 1, 2, 3)}
    assert place([wide("a", 8)], 5, 10**12) == {}


def test_idle_wide_model_gives_its_memory_and_comes_back() -> None:
    """Four engines can be on a device, two of them awake."""
    models = (wide("wide"), spec("a"), spec("b"), spec("c"), spec("d"))
    over = fleet(*models, devices=2, device_mib=8600)
    arrivals = [Arrival(0.0, "wide", 100, 20)]
    arrivals += [Arrival(10.0 + i, name, 100, 20) for i, name in enumerate("abcd" * 3)]
    arrivals += [Arrival(40.0, "wide", 100, 20)]
    replayed = replay_prism(over, arrivals, check=True)
    assert not any(outcome.failure for outcome in replayed.outcomes)
    assert replayed.wakes >= 4  # two parts among them
    last = replayed.outcomes[-1]
    assert ttft_s(last) < 1.0, "a wake of both parts side by side at most, and its own prefill"


def test_wide_models_that_cannot_both_be_awake_take_turns() -> None:
    models = (wide("a"), wide("b"))
    over = fleet(*models, devices=2, device_mib=4400)  # one awake, one asleep
    arrivals = sorted(steady("a", 60, 1.0) + steady("b", 60, 1.0), key=lambda a: (a.at_s, a.model))
    replayed = replay_prism(over, arrivals, check=True)
    assert not any(outcome.failure for outcome in replayed.outcomes)
    assert max(map(ttft_s, replayed.outcomes)) < 25.0


def test_wide_model_that_fits_nowhere_is_not_served() -> None:
    over = fleet(wide("wide", 4), spec("a"), devices=2)
    replayed = replay_prism(over, [Arrival(0.0, "wide", 10, 10), Arrival(1.0, "a", 10, 10)], check=True)
    assert [bool(outcome.failure) for outcome in replayed.outcomes] == [True, False]
    assert summarise(replayed, {m.name: m.slo for m in over.models}).failed == 1


def test_wide_model_computes_on_all_its_devices() -> None:
    """While it answers, a neighbour on either device has half the speed."""
    over = fleet(wide("wide"), spec("a"), devices=2, device_mib=9000)
    alone = replay_prism(over, [Arrival(0.0, "a", 10, 100)]).outcomes[0]
    beside = replay_prism(over, [Arrival(0.0, "a", 10, 100), Arrival(0.0, "wide", 10, 100)]).outcomes[0]
    assert alone.ended_at is not None
    assert beside.ended_at is not None
    assert beside.ended_at > 1.7 * alone.ended_at


def test_part_is_set_aside_with_its_requests_and_the_others_wait_for_it() -> None:
    clock = HeapClock()
    devices = [Device(f"gpu{i}", 10**11, clock) for i in range(2)]
    gang = Gang(wide("a"), devices, clock)
    parts = [gang.part(0), gang.part(1)]
    seen: list[str] = []

    def job(name: str) -> Job:
        key = RequestKey(RequestId(name), 1)
        return Job(key, 100, 200, lambda: seen.append(f"first {name}"), lambda: seen.append(f"end {name}"))

    def wake(part: int) -> None:
        assert devices[part].try_hold(gang.engine, parts[part].open_bytes)
        parts[part].open()

    wake(0)
    parts[0].submit(job("a"))
    clock.run(1.0)
    assert seen == [], "one part computes nothing alone"
    wake(1)
    clock.run(1.5)
    assert seen == ["first a"]
    assert parts[1].set_aside() == []
    parts[1].close(0)
    gang.check()
    assert devices[1].held_bytes == 0
    gone = job("b")
    parts[0].submit(gone)
    parts[0].cancel(gone)
    clock.run(30.0)
    assert seen == ["first a"]
    wake(1)
    clock.run(60.0)
    assert seen == ["first a", "end a"]
    gang.check()
