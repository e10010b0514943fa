from __future__ import annotations

import pytest

from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Device, HeapClock
from prism_sgl.schedulers.replay.engine import Engine
from tests.schedulers.fleets import COSTS, MIB


class Ends:
    """Times of first tokens and ends, by request."""

    def __init__(self, clock: HeapClock) -> None:
        self._clock = clock
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def job(self, key: str, prompt: int = 100, output: int = 11) -> Job:
        return Job(
            key,
            prompt,
            output,
            lambda: self.first.__setitem__(key, self._clock.now),
            lambda: self.last.__setitem__(key, self._clock.now),
        )


def engine_on(device: Device, clock: HeapClock, kv_cap_bytes: int = 0) -> Engine:
    engine = Engine("m", COSTS, (device,), clock, kv_cap_bytes=kv_cap_bytes)
    assert device.try_hold(engine, engine.open_bytes)
    engine.open()
    return engine


def one(device_mib: int = 3000) -> tuple[HeapClock, Device, Engine, Ends]:
    clock = HeapClock()
    device = Device("gpu0", device_mib * MIB, clock)
    return clock, device, engine_on(device, clock), Ends(clock)


def test_one_request_takes_its_pass_and_its_steps() -> None:
    clock, _, engine, ends = one()
    engine.submit(ends.job("a"))
    clock.run(10.0)
    first = 0.01 + 101 * 0.0001
    assert ends.first["a"] == pytest.approx(first)
    assert ends.last["a"] == pytest.approx(first + 10 * 0.011)


def test_prefill_of_a_new_request_delays_decode_by_one_pass() -> None:
    clock, _, engine, ends = one()
    engine.submit(ends.job("a", output=101))
    clock.after(0.5, lambda: engine.submit(ends.job("b", output=1)))
    clock.run(10.0)
    passes, steps = 2 * (0.01 + 101 * 0.0001), 100 * 0.011
    assert ends.last["a"] == pytest.approx(passes + steps)
    assert 0.5 < ends.first["b"] < 0.5 + 0.011 + 0.0202 + 1e-6


def test_two_computing_engines_share_the_device() -> None:
    clock = HeapClock()
    device = Device("gpu0", 3000 * MIB, clock)
    ends = Ends(clock)
    engines = [engine_on(device, clock), engine_on(device, clock)]
    for number, engine in enumerate(engines):
        engine.submit(ends.job(str(number)))
    clock.run(10.0)
    assert ends.last["0"] == pytest.approx(2 * (0.01 + 101 * 0.0001 + 10 * 0.011))
    assert device.num_active == 0


def test_kv_grows_by_the_page_and_comes_back() -> None:
    clock, device, engine, ends = one()
    before = device.held_bytes
    for number in range(4):
        engine.submit(ends.job(str(number), prompt=400, output=50))
    clock.run(0.3)
    assert device.held_bytes > before
    engine.check()
    clock.run(10.0)
    assert device.held_bytes == before
    assert len(ends.last) == 4


def test_shortage_retracts_and_everybody_is_answered() -> None:
    clock, device, engine, ends = one(device_mib=1200 + 40)  # room for 1,400 tokens
    for number in range(5):
        engine.submit(ends.job(str(number), prompt=100, output=800))
    for _ in range(2000):
        clock.run(clock.now + 0.05)
        engine.check()
        device.check()
    assert engine.num_retracted > 0
    assert sorted(ends.last) == list("01234")
    assert all(ends.first[key] <= ends.last[key] for key in ends.last)


def test_fixed_share_is_held_from_the_begin_and_never_grows() -> None:
    clock = HeapClock()
    device = Device("gpu0", 3000 * MIB, clock)
    engine = engine_on(device, clock, kv_cap_bytes=200 * MIB)
    ends = Ends(clock)
    assert device.held_bytes == 1300 * MIB
    for number in range(8):
        engine.submit(ends.job(str(number), prompt=500, output=100))
    clock.run(0.2)
    assert device.held_bytes == 1300 * MIB
    clock.run(60.0)
    assert len(ends.last) == 8


def test_cancelled_request_gives_its_memory_back() -> None:
    clock, device, engine, ends = one()
    before = device.held_bytes
    jobs = [ends.job(str(number), prompt=400, output=500) for number in range(3)]
    for job in jobs:
        engine.submit(job)
    clock.run(1.0)
    for job in jobs:
        engine.cancel(job)
        engine.check()
    clock.run(2.0)
    assert device.held_bytes == before
    assert engine.idle
    assert not ends.last


def test_claim_is_served_before_anybody_grows() -> None:
    clock = HeapClock()
    device = Device("gpu0", 100, clock)
    served: list[str] = []
    assert device.try_hold("a", 80)
    device.claim("b", 50, lambda kept: served.append("b"))
    assert not device.try_hold("a", 10), "20 are free, and claimed"
    device.release("a", 30)
    assert served == ["b"]
    assert device.held_by("b") == 50
    device.check()


def test_what_a_sleeper_keeps_goes_to_those_who_grow_the_first_sleeper_first() -> None:
    device = Device("gpu0", 100, HeapClock())
    for owner in "ab":
        assert device.try_hold(owner, 45)
        device.release(owner, 40)
        device.keep(owner, 40)
    assert device.free_bytes == 90
    assert device.try_hold("c", 50)
    assert [device.kept_by(owner) for owner in "ab"] == [0, 40]
    device.check()
    back: list[int] = []
    device.claim("b", 40, back.append)
    assert back == [40]
    assert device.held_by("b") == 45
    device.check()
