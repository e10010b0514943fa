"""A request's way through the controller: queue, grant, end."""

from __future__ import annotations

import pytest

from prism_sgl.messages import (
    Abandon,
    ApiBeat,
    ApiHello,
    Grant,
    Introduce,
    Lost,
    Refuse,
    RequestId,
    RequestKey,
    SupervisorHello,
)
from prism_sgl.schedulers import grants
from tests.schedulers.by_hand import ByHand, config, facts, granted, model, of, refusals


@pytest.fixture(autouse=True)
def window_of_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the prompts: ``prefill_window`` is then all that there is."""
    monkeypatch.setattr(grants, "WINDOW_US", 0)


def awake(**keys: int) -> ByHand:
    router = ByHand(config(model("chat"), **keys))  # type: ignore[arg-type]
    router.start_all()
    return router


def test_request_of_an_awake_model_is_granted_at_once() -> None:
    router = awake()
    assert granted(router.submit("r1")) == ["r1"]
    assert router.state("chat").in_flight == 1
    router.first_token("r1")
    router.finish("r1")
    assert router.state("chat").in_flight == 0
    assert router.controller.next_tick(router.now) is None


def test_unknown_model_is_refused_with_404_once() -> None:
    router = awake()
    assert refusals(router.submit("r1", "nobody")) == [("r1", 404, "model_not_found")]
    assert refusals(router.submit("r1", "nobody")) == []


def test_submit_again_changes_nothing() -> None:
    router = awake(prefill_window=1)
    assert granted(router.submit("r1")) == ["r1"]
    assert router.submit("r1") == []
    router.submit("r2")
    assert router.submit("r2") == []
    router.first_token("r1")
    router.finish("r1")
    assert router.submit("r1") == []  # a late copy does not bring it back to life


def test_second_attempt_replaces_the_first() -> None:
    router = awake()
    router.submit("r1")
    assert granted(router.submit("r1", attempt=2)) == ["r1"]
    assert router.state("chat").in_flight == 1
    router.finish("r1", attempt=1)
    assert router.state("chat").in_flight == 1
    router.finish("r1", attempt=2)
    assert router.state("chat").in_flight == 0


def test_prefill_window_holds_grants_until_a_first_token_is_out() -> None:
    router = awake(prefill_window=2)
    assert [granted(router.submit(f"r{i}")) for i in range(4)] == [["r0"], ["r1"], [], []]
    assert granted(router.first_token("r0")) == ["r2"]
    assert granted(router.finish("r1")) == ["r3"]


def test_window_of_a_runtime_is_what_it_runs_and_two_more() -> None:
    router = ByHand(config(model("chat"), prefill_window=100))
    router.hello("chat", facts(max_running_requests=1))
    for i in range(5):
        router.submit(f"r{i}")
        if i < 3:
            router.first_token(f"r{i}")
    assert router.state("chat").in_flight == 3
    assert granted(router.finish("r0")) == ["r3"]


def test_urgent_request_goes_first_and_a_hopeless_one_last() -> None:
    router = awake(prefill_window=1)
    router.submit("r0")
    router.submit("late", ttft_s=0.0)
    router.submit("easy", ttft_s=5.0)
    router.submit("urgent", ttft_s=0.5)
    router.submit("important", ttft_s=5.0, priority=1)
    order = []
    last = "r0"
    for _ in range(4):
        [last] = granted(router.first_token(last))
        order.append(last)
    assert order == ["important", "urgent", "easy", "late"]


def test_queue_bound_is_429_with_a_time_to_come_back() -> None:
    router = ByHand(config(model("chat"), max_queue=2))
    router.submit("r1")
    router.submit("r2")
    commands = router.submit("r3")
    assert refusals(commands) == [("r3", 429, "queue_full")]
    assert router.state("chat").queued == 2


def test_request_that_waits_too_long_for_its_model_is_refused() -> None:
    router = ByHand(config(model("chat")))
    router.submit("r1", waited_s=100.0)
    router.submit("r2")
    assert refusals(router.wait(499)) == []
    assert refusals(router.wait(3)) == [("r1", 503, "activation_timeout")]
    assert refusals(router.wait(100)) == [("r2", 503, "activation_timeout")]


def test_second_try_waits_from_when_the_first_one_was_lost() -> None:
    router = awake()
    router.submit("r1", stream=False)
    router.wait(700)
    router.exit("chat")
    router.submit("r1", attempt=2, stream=False, waited_s=700.0)
    assert refusals(router.wait(599)) == []
    commands = router.wait(2)
    assert refusals(commands) == [("r1", 503, "activation_timeout")]
    assert "in 600 s" in of(commands, Refuse)[0].message


def test_grant_tells_how_long_the_model_took_to_come_up() -> None:
    router = ByHand(config(model("chat")))
    router.now += 5
    router.submit("r1", waited_s=1.0)
    router.now += 7
    [grant] = of(router.hello("chat"), Grant)
    assert (grant.queued_s, grant.activation_s) == (8.0, 8.0)


def test_abandoned_request_is_forgotten_wherever_it_is() -> None:
    router = awake(prefill_window=1)
    router.submit("r1")
    router.submit("r2")
    router.api(Abandon(request=RequestId("r2")))
    assert router.state("chat").queued == 0
    router.api(Abandon(request=RequestId("r1")))
    assert router.state("chat").in_flight == 0
    router.finish("r1")  # the runtime's word comes late
    assert granted(router.submit("r3")) == ["r3"]


def test_requests_of_a_dead_runtime_are_lost_and_the_queue_is_kept() -> None:
    router = awake(prefill_window=1)
    router.submit("r1")
    router.submit("r2")
    commands = router.exit("chat")
    assert [(lost.request, lost.attempt) for lost in of(commands, Lost)] == [("r1", 1)]
    assert refusals(commands) == []
    router.submit("r1", attempt=2)
    router.wait(1.1)
    assert granted(router.hello("chat")) == ["r1"] or router.state("chat").queued == 1


def test_stranger_is_introduced_and_its_requests_wait_for_its_hello() -> None:
    router = ByHand(config(model("chat")), hello=False)
    router.supervisor(SupervisorHello())
    assert of(router.api(ApiBeat(api="api")), Introduce) == [Introduce(epoch=1)]
    assert of(router.submit("r1"), Introduce) == []  # once a second is enough
    router.now += 1.0
    assert of(router.submit("r1"), Introduce) == [Introduce(epoch=1)]
    assert router.state("chat").queued == 0
    router.api(ApiHello(api="api"))
    router.submit("r1")
    assert router.state("chat").queued == 1


def test_grant_that_nobody_confirmed_is_sent_again() -> None:
    router = awake()
    router.submit("r1")
    assert granted(router.wait(11)) == ["r1"]
    router.first_token("r1")
    assert granted(router.wait(30)) == []


def test_silent_api_server_and_its_requests_are_forgotten() -> None:
    router = awake(prefill_window=1)
    router.submit("r1")
    router.submit("r2")
    router.wait(32, beats=False)
    assert (router.state("chat").queued, router.state("chat").in_flight) == (0, 0)
    # It was only slow: it tells of what it has again.
    router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), router.id("chat"))]))
    router.submit("r2")
    assert (router.state("chat").queued, router.state("chat").in_flight) == (1, 1)


def test_finish_that_was_lost_is_seen_in_the_heartbeat() -> None:
    router = awake()
    router.api(ApiHello(api="api", granted=[(RequestKey(RequestId("r1"), 1), router.id("chat"))]))
    assert router.state("chat").in_flight == 1
    router.load("chat")
    assert router.state("chat").in_flight == 1
    router.now += 11
    router.load("chat")
    assert router.state("chat").in_flight == 0
