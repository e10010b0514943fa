"""Starts, deaths, restarts of runtimes, and of the router itself."""

from __future__ import annotations

import pytest

from prism_sgl.errors import IllegalMoveError
from prism_sgl.messages import (
    ApiHello,
    AskHello,
    Introduce,
    Lost,
    RequestId,
    RequestKey,
    RuntimeExited,
    RuntimeId,
    RuntimeState,
    StopRuntime,
    SupervisorHello,
)
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.records import LEGAL_MOVES
from tests.schedulers.by_hand import (
    ByHand,
    config,
    granted,
    hello_of,
    model,
    of,
    refusals,
    started_models,
)

OLD = RuntimeId("chat@host0.1-1")


def load_of(runtime: RuntimeId, state: RuntimeState = RuntimeState.AWAKE) -> object:
    from prism_sgl.messages import Load

    return Load(runtime=runtime, state=state, weights_bytes=0, kv_bytes=0, wanted_bytes=0, in_flight=0)


def restarted() -> ByHand:
    """A second router, before anybody has spoken to it."""
    return ByHand(config(model("chat")), epoch=2, hello=False)


def test_illegal_move_names_both_states() -> None:
    fleet = Fleet(config(model("chat")))
    with pytest.raises(IllegalMoveError, match="chat cannot go from cold to awake"):
        fleet.move(fleet.models["chat"].runtime, RuntimeState.AWAKE, 0.0, "")


def test_every_state_can_fail_and_only_a_start_leads_out_of_it() -> None:
    assert set(LEGAL_MOVES) == set(RuntimeState)
    for state, moves in LEGAL_MOVES.items():
        assert (RuntimeState.FAILED in moves) == (state is not RuntimeState.FAILED)
    assert LEGAL_MOVES[RuntimeState.FAILED] == {RuntimeState.STARTING}
    assert RuntimeState.ASLEEP not in LEGAL_MOVES[RuntimeState.STARTING]


def test_nothing_starts_before_the_supervisor_has_spoken() -> None:
    router = restarted()
    commands = router.tick() + router.api(ApiHello(api="api")) + router.submit("r1")
    assert of(commands, Introduce) == [Introduce(epoch=2)]
    assert started_models(commands) == []
    assert router.controller.next_tick(router.now) is not None
    assert started_models(router.supervisor(SupervisorHello())) == ["chat"]


def test_runtime_of_an_earlier_router_is_asked_for_its_hello_and_not_started_twice() -> None:
    router = restarted()
    commands = router.supervisor(SupervisorHello(alive=[OLD]))
    assert of(commands, AskHello) == [AskHello(epoch=2)]
    assert started_models(commands) == []
    assert router.state("chat").state == "starting"
    assert of(router.runtime(load_of(OLD)), AskHello) == []  # once a second at most
    router.now += 1
    assert of(router.runtime(load_of(OLD)), AskHello) == [AskHello(epoch=2)]
    router.runtime(hello_of(OLD, RuntimeState.ASLEEP))
    assert router.state("chat").state == "asleep"


def test_restarted_router_counts_what_is_in_flight_once() -> None:
    router = restarted()
    router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), OLD)]))
    router.supervisor(SupervisorHello(alive=[OLD]))
    router.runtime(hello_of(OLD, RuntimeState.AWAKE, "r1", "r2"))
    assert router.state("chat").in_flight == 2
    router.finish("r1")
    router.finish("r2")
    assert router.state("chat").in_flight == 0
    # r1's end has not reached its api_server yet:
    router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), OLD)]))
    assert router.state("chat").in_flight == 0


def test_grant_on_a_runtime_that_died_with_the_router_is_lost() -> None:
    router = restarted()
    router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), OLD)]))
    assert [lost.request for lost in of(router.supervisor(SupervisorHello()), Lost)] == ["r1"]
    later = router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r2"), 1), OLD)]))
    assert [lost.request for lost in of(later, Lost)] == ["r2"]


def test_api_server_that_says_hello_after_its_runtime_died_is_told() -> None:
    router = restarted()
    router.supervisor(SupervisorHello(alive=[OLD]))
    router.runtime(hello_of(OLD, RuntimeState.AWAKE, "r1"))
    router.exit("chat")
    commands = router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), OLD)]))
    assert [lost.request for lost in of(commands, Lost)] == ["r1"]


def test_whose_request_is_lost_is_told_the_exit_and_the_state_the_error_too() -> None:
    router = ByHand(config(model("chat")))
    router.start_all()
    router.submit("r1")
    exited = RuntimeExited(runtime=router.id("chat"), reason="exit code 1", error="ValueError: y")
    [lost] = of(router.supervisor(exited), Lost)
    assert lost.reason == "exit code 1"
    assert router.state("chat").reason.startswith("exit code 1: ValueError: y; starts again in")


def test_second_runtime_of_a_model_is_stopped() -> None:
    router = restarted()
    other = RuntimeId("chat@host0.1-2")
    commands = router.supervisor(SupervisorHello(alive=[OLD, other]))
    assert [stop.runtime for stop in of(commands, StopRuntime)] == [other]


def test_late_word_of_a_dead_runtime_is_ignored() -> None:
    router = ByHand(config(model("chat")))
    router.start_all()
    dead = router.id("chat")
    router.exit("chat")
    assert router.runtime(load_of(dead)) == []
    assert router.runtime(hello_of(dead, RuntimeState.AWAKE)) == []
    assert router.supervisor(RuntimeExited(runtime=dead, reason="again")) == []
    assert router.state("chat").state == "failed"


def test_stranger_is_asked_and_then_the_supervisor() -> None:
    router = ByHand(config(model("chat", preload=False)))
    assert of(router.runtime(load_of(OLD)), AskHello) != []
    router.now += 1
    commands = router.runtime(hello_of(OLD, RuntimeState.AWAKE))
    assert of(commands, Introduce) == [Introduce(epoch=1)]
    assert router.state("chat").state == "cold"


def test_runtime_that_was_ready_starts_again_with_back_off() -> None:
    router = ByHand(config(model("chat")))
    for wait_s in (1.0, 2.0, 4.0):
        router.hello("chat")
        router.now += 5
        router.exit("chat")
        assert "starts again" in router.state("chat").reason
        assert started_models(router.wait(wait_s - 0.1)) == []
        assert started_models(router.wait(0.2)) == ["chat"]
    router.hello("chat")
    router.now += 61  # healthy: forgotten
    router.exit("chat")
    assert started_models(router.wait(1.1)) == ["chat"]


def test_model_that_cannot_load_is_failed_with_its_reason() -> None:
    router = ByHand(config(model("chat")))
    router.submit("r1")
    assert refusals(router.exit("chat", "no such file")) == [("r1", 503, "model_failed")]
    assert router.state("chat").state == "failed"
    assert router.state("chat").reason == "no such file"
    assert refusals(router.submit("r2")) == [("r2", 503, "model_failed")]
    for wait_s in (1.1, 2.1, 4.1):
        assert started_models(router.wait(wait_s)) == ["chat"]
        router.exit("chat", "no such file")
    assert started_models(router.wait(59)) == []
    assert refusals(router.submit("r3")) == [("r3", 503, "model_failed")]
    router.now += 2
    assert started_models(router.submit("r4")) == ["chat"]  # a minute later it gets another chance
    assert granted(router.hello("chat")) == ["r4"]


def test_retry_that_is_due_and_cannot_start_yet_asks_for_no_more_ticks() -> None:
    router = ByHand(config(model("chat"), model("code"), start_parallel=1))
    assert started_models(router.exit("chat", "no such file")) == ["code"]
    assert started_models(router.wait(1.1)) == []
    assert router.controller.next_tick(router.now) is None
    assert started_models(router.hello("code")) == ["chat"]


def test_ids_are_never_used_again() -> None:
    router = ByHand(config(model("chat")))
    ids = set()
    for _ in range(5):
        ids.add(router.id("chat"))
        router.hello("chat")
        router.exit("chat")
        router.wait(70)
    assert len(ids) == 5


def test_silent_runtime_is_only_remarked() -> None:
    router = ByHand(config(model("chat")))
    router.start_all()
    router.load("chat")
    router.now += 11
    assert router.state("chat").state == "awake"
    assert router.state("chat").reason == "silent for 11 s"
    router.load("chat")
    assert "silent" not in router.state("chat").reason
