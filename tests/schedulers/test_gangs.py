"""A model over several devices: its parts want, wake, give and end together."""

from __future__ import annotations

from prism_sgl.messages import Lost, Sleep, StopRuntime
from tests.schedulers.by_hand import (
    ByHand,
    config,
    granted,
    model,
    of,
    slept_models,
    started_models,
    woken_models,
)


def gang_and_two(budget_mib: int = 300) -> ByHand:
    """wide over both devices, chat on the first and code on the second; a device holds one awake, and wide sleeps."""
    router = ByHand(
        config(
            model("wide", devices=("host0",)),
            model("wide#1", devices=("host1",), part_of="wide"),
            model("chat", devices=("host0",)),
            model("code", devices=("host1",)),
            budget_mib=budget_mib,
            devices=2,
        )
    )
    router.start_all()
    router.now += 100
    return router


def states(router: ByHand) -> list[str]:
    return [str(router.state(name).state) for name in ("wide", "wide#1", "chat", "code")]


def wide_is_awake() -> ByHand:
    router = gang_and_two()
    router.submit("r1", "wide")
    for name in ("chat", "code"):
        router.slept(router.id(name))
    for name in ("wide", "wide#1"):
        router.woke(name)
    router.now += 3
    assert states(router) == ["awake", "awake", "asleep", "asleep"]
    return router


def test_its_parts_are_woken_together_and_the_lead_alone_has_requests() -> None:
    router = gang_and_two()
    assert states(router) == ["asleep", "asleep", "awake", "awake"]
    assert sorted(slept_models(router.submit("r1", "wide"))) == ["chat", "code"]
    assert woken_models(router.slept(router.id("chat"))) == [], "the other one has no room yet"
    assert sorted(woken_models(router.slept(router.id("code")))) == ["wide", "wide#1"]
    assert granted(router.woke("wide")) == []
    assert granted(router.woke("wide#1")) == ["r1"]
    assert granted(router.submit("r2", "wide")) == ["r2"]


def test_nobody_sleeps_for_a_part_while_another_has_no_room() -> None:
    router = gang_and_two()
    router.submit("r1", "code")
    assert slept_models(router.submit("r2", "wide")) == [], "code is busy, so chat would sleep in vain"
    assert slept_models(router.wait(9.0)) == []
    assert slept_models(router.wait(1.5)) == ["chat"], "its turn: code drains"
    assert woken_models(router.slept(router.id("chat"))) == []
    assert slept_models(router.finish("r1", "code")) == ["code"]
    assert sorted(woken_models(router.slept(router.id("code")))) == ["wide", "wide#1"]


def test_whose_turn_is_due_keeps_all_its_devices() -> None:
    """chat's memory is free, and chat wants it back; but wide waits for code, and has waited for longer."""
    router = gang_and_two()
    router.submit("r1", "code")
    router.submit("r2", "wide")
    router.wait(10.5)
    router.slept(router.id("chat"))
    assert woken_models(router.submit("r3", "chat")) == []
    router.finish("r1", "code")
    assert sorted(woken_models(router.slept(router.id("code")))) == ["wide", "wide#1"]


def test_idle_parts_give_together_and_one_that_computes_is_idle_nowhere() -> None:
    router = wide_is_awake()
    assert slept_models(router.submit("r2", "code")) == []
    assert sorted(slept_models(router.finish("r1", "wide"))) == ["wide", "wide#1"]


def test_turn_ends_on_all_devices_and_requests_go_on_when_all_are_awake_again() -> None:
    router = wide_is_awake()
    router.submit("r2", "code")
    router.wait(10.5)
    assert states(router)[:2] == ["draining", "draining"]
    asleep = of(router.wait(10.5), Sleep)
    assert sorted(sleep.runtime for sleep in asleep) == sorted(map(router.id, ("wide", "wide#1")))
    assert all(sleep.preempt for sleep in asleep)
    for sleep in asleep:
        router.slept(sleep.runtime)
    router.woke("code")
    router.finish("r2", "code")
    router.now += 3
    router.tick()
    assert sorted(woken_models(router.slept(router.id("code")))) == ["wide", "wide#1"]


def test_parts_end_and_start_together() -> None:
    router = wide_is_awake()
    stopped = of(router.exit("wide#1"), StopRuntime)
    assert [stop.runtime for stop in stopped] == [router.id("wide")]
    lost = router.exit("wide", "stopped", expected=True)
    assert [message.request for message in of(lost, Lost)] == ["r1"]
    assert sorted(started_models(lost + router.wait(2.0))) == ["wide", "wide#1"]
