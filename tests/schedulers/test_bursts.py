"""Where an idle model's next burst is served: with whom it would compute, what the hop costs, and when it stays."""

from __future__ import annotations

from collections import Counter

import pytest

from prism_sgl.config import SchedulerConfig
from prism_sgl.messages import (
    AskAdmin,
    Finished,
    Grant,
    Hello,
    Load,
    RequestId,
    RuntimeId,
    RuntimeState,
    Sleep,
    StartRuntime,
    Wake,
    WakeFailed,
    Woke,
)
from prism_sgl.schedulers import placement
from prism_sgl.schedulers.bursts import Option, better
from prism_sgl.schedulers.controller import Command
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.memory_plan import Room, Verdict
from prism_sgl.schedulers.placement import Choice
from prism_sgl.schedulers.records import Runtime
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.spec import Arrival, Replayed
from prism_sgl.schedulers.room import RoomMaker
from tests.schedulers.by_hand import (
    FLOOR,
    MIB,
    WEIGHTS,
    ByHand,
    config,
    facts,
    granted,
    model,
    of,
    woken_models,
)
from tests.schedulers.fleets import fleet, spec

HOME, SPARE = RuntimeId("chat@host0.1-1"), RuntimeId("chat@host1.1-2")


# ---------------------------------------------------------------- the rule


def option(num_beside: int, first_s: float, device: str = "d") -> Option:
    return Option(device, num_beside, first_s)


def test_it_goes_where_fewer_compute_and_says_so() -> None:
    why = better(option(3, 0.04, "gpu0"), option(1, 0.03, "gpu1"), left_s=0.1)
    assert why is not None
    assert "finds 1 models computing on gpu1 instead of 3 on gpu0: first token in 30 ms" in why


@pytest.mark.parametrize("num_there", [2, 3])
def test_it_stays_where_no_fewer_compute_however_quick_the_other_is(num_there: int) -> None:
    assert better(option(2, 0.5), option(num_there, 0.01), left_s=1.0) is None


def test_first_request_does_not_pay_for_the_others() -> None:
    """A wake that copies: in time with a quarter to spare, or no later than at home."""
    assert better(option(2, 0.03), option(0, 0.074), left_s=0.1)
    assert better(option(2, 0.03), option(0, 0.076), left_s=0.1) is None
    assert better(option(2, 0.08), option(0, 0.076), left_s=0.1)


def test_late_request_hops_only_where_it_is_sooner() -> None:
    assert better(option(2, 0.03), option(0, 0.02), left_s=-1.0)
    assert better(option(2, 0.03), option(0, 0.04), left_s=-1.0) is None


# ---------------------------------------------------------------- commands


def two_devices(awake_s: float = 5.0, min_residence_s: float = 2.0, **keys: object) -> ByHand:
    """``chat`` is awake and idle on host0 beside ``busy``, its spare sleeps on host1 with its weights in place."""
    busy = model("busy", devices=("host0",), preload=False)
    models = (model("chat", **keys), busy)
    router = ByHand(config(*models, devices=2, budget_mib=700, spares=True, min_residence_s=min_residence_s))
    router.start_all()
    assert [start.runtime for start in of(router.all, StartRuntime)][-1] == SPARE
    told = Hello(
        runtime=SPARE, model="chat", device="host1", state=RuntimeState.AWAKE, facts=facts(), start_s=1.0
    )
    router.runtime(told)
    assert [(sleep.runtime, sleep.keep_weights) for sleep in of(router.all, Sleep)] == [(SPARE, True)]
    router.slept(SPARE)
    keeps(router, WEIGHTS)
    router.submit("b0", "busy")
    router.hello("busy")
    router.finish("b0", "busy")
    assert (router.state("chat").device, router.state("busy").device) == ("host0", "host0")
    router.now += awake_s
    return router


def keeps(router: ByHand, weights_bytes: int) -> None:
    state = RuntimeState.ASLEEP
    router.runtime(
        Load(runtime=SPARE, state=state, weights_bytes=weights_bytes, kv_bytes=0, wanted_bytes=0, in_flight=0)
    )


def finish(router: ByHand, request: str, runtime: RuntimeId) -> list[Command]:
    key = {"runtime": runtime, "request": RequestId(request), "attempt": 1}
    return router.runtime(Finished(**key, outcome="ok", status=200, total_s=0.1))  # type: ignore[arg-type]


def hops(commands: list[Command]) -> bool:
    return woken_models(commands) == ["chat"]


def test_burst_of_an_idle_model_is_served_where_nobody_computes() -> None:
    router = two_devices()
    assert granted(router.submit("b1", "busy")) == ["b1"]
    commands = router.submit("r1")
    assert [wake.runtime for wake in of(commands, Wake)] == [SPARE]
    assert [(sleep.runtime, sleep.keep_weights) for sleep in of(commands, Sleep)] == [(HOME, True)]
    assert granted(commands) == []
    router.submit("r2")  # of the same burst: it waits for the wake too
    woke = router.runtime(Woke(runtime=SPARE, seconds=0.01))
    assert [(grant.request, grant.runtime) for grant in of(woke, Grant)] == [("r1", SPARE), ("r2", SPARE)]
    router.slept(HOME)
    status = router.state("chat")
    assert (status.device, status.moves) == ("host1", 0)
    assert [(o.runtime, o.role, o.state) for o in status.others] == [(HOME, "spare", "asleep")]
    events = "\n".join(router.controller._fleet.events)
    assert (
        "chat: home is host1 (idle, and its next burst finds 0 models computing on host1 instead of 1"
        in events
    )


def test_burst_stays_where_it_began() -> None:
    """Parted over two devices it would read the weights twice."""
    router = two_devices()
    assert granted(router.submit("r1")) == ["r1"]
    router.submit("b1", "busy")
    assert granted(router.submit("r2")) == ["r2"]
    assert not of(router.all, Wake)


def test_it_stays_where_nobody_computes() -> None:
    router = two_devices()
    assert granted(router.submit("r1")) == ["r1"]


@pytest.mark.parametrize(("kept_bytes", "leaves"), [(WEIGHTS, True), (0, False)])
def test_it_stays_if_its_weights_are_gone_and_their_copy_would_make_it_late(
    kept_bytes: int, leaves: bool
) -> None:
    router = two_devices()
    router.submit("b1", "busy")
    keeps(router, kept_bytes)
    latency = router.controller._fleet.models["chat"].latency
    latency.alpha_s, latency.s_per_token = 0.007, 0.0
    # 14 ms at home beside one; there 7, a wake of 10, and 4 ms to copy 200 MiB. Three quarters of the time are 19.
    assert hops(router.submit("r1", ttft_s=0.025)) is leaves


def test_it_stays_where_its_burst_would_press_others_kv() -> None:
    router = two_devices()
    router.submit("b1", "busy")
    device = router.controller._fleet.devices["host1"]
    device.budget_bytes = WEIGHTS + FLOOR + 20 * MIB
    assert not hops(router.submit("r1"))


@pytest.mark.parametrize(("awake_s", "leaves"), [(1.9, False), (2.1, True)])
def test_it_stays_for_its_residence(awake_s: float, leaves: bool) -> None:
    router = two_devices(awake_s)
    router.submit("b1", "busy")
    assert hops(router.submit("r1")) is leaves


def test_it_stays_where_it_went_until_others_compute_there() -> None:
    router = two_devices()
    router.submit("b1", "busy")
    assert hops(router.submit("r1"))
    router.slept(HOME)
    router.runtime(Woke(runtime=SPARE, seconds=0.01))
    finish(router, "r1", SPARE)
    router.finish("b1", "busy")
    router.now += 3
    assert granted(router.submit("r2")) == ["r2"], "nobody computes beside it"
    assert router.state("chat").device == "host1"


def test_pinned_model_and_one_that_an_operator_moved_stay() -> None:
    router = two_devices(pin=True)
    router.submit("b1", "busy")
    assert granted(router.submit("r1")) == ["r1"]
    router = two_devices()
    router.api(AskAdmin(ask="m", verb="move", model="chat", device="host1"))
    router.runtime(Woke(runtime=SPARE, seconds=0.01))
    router.slept(HOME)
    router.api(AskAdmin(ask="m", verb="move", model="chat", device="host0"))
    router.runtime(Woke(runtime=HOME, seconds=0.01))
    router.slept(SPARE)
    router.submit("b1", "busy")
    router.now += 10
    assert not hops(router.submit("r1")), "where the operator wants it, for half a window"
    router.finish("r1")
    router.now += 30
    assert hops(router.submit("r2"))


def test_spare_that_finds_no_memory_leaves_the_burst_to_its_old_home() -> None:
    router = two_devices()
    router.submit("b1", "busy")
    router.submit("r1")
    router.slept(HOME)
    router.runtime(WakeFailed(runtime=SPARE, reason="no memory"))
    woken = of(router.wait(5), Wake)
    assert woken, "the request waits for nobody"
    served = router.runtime(Woke(runtime=woken[0].runtime, seconds=0.01))
    assert granted(served) == ["r1"]


@pytest.mark.parametrize("min_residence_s", [2.0, 0.0])
def test_devices_that_each_look_better_from_the_other_are_not_swapped_for_ever(
    monkeypatch: pytest.MonkeyPatch, min_residence_s: float
) -> None:
    """It sleeps on both and has room on neither; within one event nothing else changes."""
    router = two_devices(min_residence_s=min_residence_s)
    router.admin("sleep")
    router.slept(HOME)
    swaps: list[float] = []
    swap_home = Fleet.swap_home

    def swap(self: Fleet, spare: Runtime, why: str) -> None:
        swaps.append(router.now)
        assert len(swaps) < 10, "for ever"
        swap_home(self, spare, why)

    monkeypatch.setattr(Fleet, "swap_home", swap)
    monkeypatch.setattr(
        placement,
        "choose",
        lambda its, places, unit: Choice([place.device for place in places][-1], "better"),
    )
    monkeypatch.setattr(RoomMaker, "find", lambda rooms, needs, *_: {needs[0]: Room(Verdict.BLOCKED)})
    router.submit("r1")
    assert swaps == [router.now]
    router.wait(5)
    assert len(swaps) <= 3 or not min_residence_s
    assert len(set(swaps)) == len(swaps), "twice in one event"


# ---------------------------------------------------------------- in a replay


def bursts(seconds: float) -> list[Arrival]:
    """``a`` and ``b`` answer for long, in turns that overlap now and then; ``c`` has a short burst each 5 s."""
    listed = [Arrival(at, "a", 100, 400) for at in range(0, int(seconds), 20)]
    listed += [Arrival(at + 7.0, "b", 100, 400) for at in range(0, int(seconds), 20)]
    for at in range(1, int(seconds), 5):
        listed += [Arrival(at + i * 0.01, "c", 100, 40) for i in range(4)]
    return sorted(listed, key=lambda arrival: arrival.at_s)


def replay(spares: bool) -> Replayed:
    # All fit awake on one device, and each on both: what binds is compute.
    over = fleet(spec("a"), spec("b"), spec("c"), devices=2, device_mib=14_000)
    limits = SchedulerConfig(start_parallel=3, spares=spares)
    return replay_prism(over, bursts(120.0), scheduler=limits, check=True)


def _seconds(replayed: Replayed) -> float:
    ends = [o.ended_at - o.arrived_at for o in replayed.outcomes if o.ended_at is not None]
    assert len(ends) == len(replayed.outcomes)
    return sum(ends) / len(ends)


def test_answers_are_sooner_and_wakes_are_bounded() -> None:
    stays, hops = replay(spares=False), replay(spares=True)
    assert stays.wakes == 0
    assert 0 < hops.wakes <= 120 / SchedulerConfig().min_residence_s
    assert _seconds(hops) < 0.9 * _seconds(stays)
    late = Counter(o.model for o in hops.outcomes if o.first_at is None or o.first_at - o.arrived_at > 0.5)
    assert not late
