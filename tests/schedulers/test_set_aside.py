"""Requests that a runtime fell asleep with, while its model has another one: they go on, or are tried elsewhere."""

from __future__ import annotations

from prism_sgl.messages import (
    ApiHello,
    Finished,
    FirstToken,
    Grant,
    Lost,
    RequestId,
    RequestKey,
    RuntimeExited,
    RuntimeId,
    RuntimeState,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    Wake,
    Woke,
)
from prism_sgl.schedulers.records import Role
from tests.schedulers.by_hand import (
    WEIGHTS,
    ByHand,
    config,
    facts,
    hello_of,
    model,
    of,
    slept_models,
    started_models,
)

ASLEEP, AWAKE = RuntimeState.ASLEEP, RuntimeState.AWAKE
HOME, OTHER = RuntimeId("chat@host0.1-1"), RuntimeId("chat@host1.1-3")


def roles(router: ByHand) -> list[tuple[str | None, str, str]]:
    return [(other.runtime, other.role, other.state) for other in router.state("chat").others]


def replica_comes_while_home_gives_its_turn() -> ByHand:
    """``chat`` answers ``r1`` on host0 and its replica starts on host1, when ``code`` has its turn on host0.

    ``busy`` is awake on host1, and host2 is empty.
    """
    models = (
        model("chat"),
        model("busy", devices=("host1",), pin=True),
        model("code", devices=("host0",), preload=False, weights_bytes=2 * WEIGHTS),
    )
    router = ByHand(config(*models, devices=3, budget_mib=600, max_wait_s=10.0))
    router.start_all()
    assert router.id("chat") == HOME
    router.submit("r1")
    router.first_token("r1")
    router.now += 3
    chat = router.controller._fleet.models["chat"]
    router.controller._mover.begin(chat, "host1", router.now, "hot", Role.REPLICA)
    assert [start.runtime for start in of(router.tick(), StartRuntime)] == [OTHER]
    router.submit("q1", "code")
    assert slept_models(router.wait(21)) == ["chat"]
    return router


def test_home_is_woken_for_what_it_sleeps_with_though_a_replica_serves() -> None:
    router = replica_comes_while_home_gives_its_turn()
    assert started_models(router.slept(HOME)) == ["code"]
    router.runtime(hello_of(OTHER, AWAKE))
    router.hello("code", facts(weights_bytes=2 * WEIGHTS))
    assert (router.state("chat").runtime, roles(router)) == (HOME, [(OTHER, "replica", "awake")])
    assert [grant.runtime for grant in of(router.submit("r2"), Grant)] == [OTHER]
    router.finish("q1", "code")
    assert slept_models(router.wait(3)) == ["code"]
    assert [wake.runtime for wake in of(router.slept(router.id("code")), Wake)] == [HOME]
    router.runtime(Woke(runtime=HOME, seconds=0.1))
    router.finish("r1")
    assert (router.state("chat").state, router.state("chat").in_flight) == ("awake", 1)
    assert of(router.all, StopRuntime) == []


def test_home_stays_the_home_while_it_falls_asleep_with_requests() -> None:
    router = replica_comes_while_home_gives_its_turn()
    router.runtime(hello_of(OTHER, AWAKE))
    assert (router.state("chat").runtime, router.state("chat").state) == (HOME, "draining")
    router.slept(HOME)
    assert (router.state("chat").runtime, router.state("chat").state) == (HOME, "asleep")


def test_replica_is_the_home_once_nothing_is_set_aside_any_more() -> None:
    router = replica_comes_while_home_gives_its_turn()
    router.slept(HOME)
    router.runtime(hello_of(OTHER, AWAKE))
    router.finish("r1")  # its last words, or its client has gone
    assert router.state("chat").runtime == OTHER
    assert [stop.runtime for stop in of(router.all, StopRuntime)] == [HOME]


def test_replica_does_not_move_while_its_home_is_set_aside() -> None:
    """A target of it would be started in vain: it is the home that a move replaces, and this one is to be woken."""
    router = replica_comes_while_home_gives_its_turn()
    router.slept(HOME)
    router.runtime(hello_of(OTHER, AWAKE))
    router.hello("code", facts(weights_bytes=2 * WEIGHTS))
    router.wait(60)
    before = len(router.all)
    for number in range(600):
        name = ("chat", "busy")[number % 2]
        [grant] = of(router.submit(f"n{number}", name, prompt_tokens=200), Grant)
        key = {"runtime": grant.runtime, "request": grant.request, "attempt": 1}
        router.runtime(FirstToken(**key, ttft_s=0.08))  # type: ignore[arg-type]
        router.runtime(Finished(**key, outcome="ok", status=200, total_s=0.5, completion_tokens=10))  # type: ignore[arg-type]
        router.wait(0.1)
    assert router.state("chat").runtime == HOME
    assert started_models(router.all[before:]) == []


def test_what_a_restarted_router_finds_asleep_behind_the_new_home_is_ended_at_its_deadline() -> None:
    """The target of a move that is awake speaks first; what the old home sleeps with is tried again elsewhere."""
    router = ByHand(config(model("chat"), devices=2, move_drain_s=20.0), epoch=2, hello=False)
    router.supervisor(SupervisorHello(alive=[HOME, OTHER]))
    router.runtime(hello_of(OTHER, AWAKE))
    router.runtime(hello_of(HOME, ASLEEP, "r1"))
    router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), HOME)]))
    assert (router.state("chat").runtime, roles(router)) == (OTHER, [(HOME, "leaving", "asleep")])
    assert of(router.wait(19), StopRuntime) == []
    assert [stop.runtime for stop in of(router.wait(2), StopRuntime)] == [HOME]
    exited = RuntimeExited(runtime=HOME, reason="stopped", expected=True)
    assert [lost.request for lost in of(router.supervisor(exited), Lost)] == ["r1"]


def test_runtime_that_sleeps_with_requests_is_not_kept_as_the_spare() -> None:
    """It was the home of an earlier router; a spare may sleep for ever."""
    router = ByHand(config(model("chat"), devices=2, move_drain_s=20.0, spares=True), epoch=2, hello=False)
    router.supervisor(SupervisorHello(alive=[HOME, OTHER]))
    router.runtime(hello_of(HOME, ASLEEP))
    router.runtime(hello_of(OTHER, ASLEEP, "r1"))
    assert roles(router) == [(OTHER, "leaving", "asleep")]
    assert [stop.runtime for stop in of(router.wait(21), StopRuntime)] == [OTHER]
