"""What the local scheduler promises, learns and tells: tiers, deadlines in grants, estimates, turns of the aged."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from prism_sgl.messages import Finished, FirstToken, Grant, RequestId, Started
from prism_sgl.schedulers import dispatch, grants
from prism_sgl.schedulers.records import Request
from tests.schedulers.by_hand import MIB, ByHand, config, facts, granted, model, of


def awake(*names: str, prefill_window: int = 4, **known: int) -> ByHand:
    router = ByHand(config(*(model(name) for name in names or ("chat",)), prefill_window=prefill_window))
    for name in names or ("chat",):
        router.hello(name, facts(**known))
    return router


def answer(
    router: ByHand, request: str, ttft_s: float, *, prompt: int = 0, cached: int = 0, answer: int = 0
) -> None:
    key = {"runtime": router.id("chat"), "request": RequestId(request), "attempt": 1}
    router.runtime(Started(**key))  # type: ignore[arg-type]
    router.runtime(FirstToken(**key, ttft_s=ttft_s))  # type: ignore[arg-type]
    usage = {"prompt_tokens": prompt, "cached_tokens": cached, "completion_tokens": answer}
    router.runtime(Finished(**key, outcome="ok", status=200, total_s=1.0, **usage))  # type: ignore[arg-type]


def test_grant_says_by_when_and_how_urgent() -> None:
    router = awake()
    [grant] = of(router.submit("r1", ttft_s=3.0, priority=2, waited_s=1.0), Grant)
    assert grant.due is not None
    assert grant.due.in_s == pytest.approx(2.0)
    assert (grant.due.waited_s, grant.due.priority) == (1.0, 2)
    assert grant.due.needed_s > 0.0


def test_grant_that_is_sent_again_counts_the_time_that_has_passed() -> None:
    router = awake()
    router.submit("r1", ttft_s=3.0)
    [grant] = of(router.wait(11), Grant)
    assert grant.due is not None
    assert grant.due.in_s == pytest.approx(3.0 - 10.0, abs=1.1)


@pytest.mark.parametrize(
    ("tier", "in_s", "priority"), [("", 1.0, 0), ("auto", 1.0, 0), ("priority", 1.0, 1), ("flex", 10.0, -1)]
)
def test_tiers(tier: str, in_s: float, priority: int) -> None:
    [grant] = of(awake().submit("r1", service_tier=tier), Grant)
    assert grant.due is not None
    assert (grant.due.in_s, grant.due.priority) == (pytest.approx(in_s), priority)


def test_time_that_the_engine_spent_on_others_is_not_charged() -> None:
    """Four in one engine, one after the other, each for 0.1 s."""
    router = awake(prefill_window=4)
    for turn in range(10):
        for i in range(4):
            router.submit(f"r{turn}.{i}")
        for i in range(4):
            answer(router, f"r{turn}.{i}", 0.1 * (i + 1))
    [grant] = of(router.submit("last"), Grant)
    assert grant.due is not None
    assert grant.due.needed_s == pytest.approx(0.1, rel=0.2)


def test_cached_tokens_in_usage_lower_the_estimate() -> None:
    router = awake()
    for i in range(40):
        router.submit(f"r{i}", prompt_tokens=(1000, 100)[i % 2])
        answer(router, f"r{i}", (0.11, 0.02)[i % 2], prompt=(1000, 100)[i % 2], cached=(900, 90)[i % 2])
    state = router.state("chat")
    assert state.hit_ratio == pytest.approx(0.9, abs=0.01)
    [grant] = of(router.submit("last", prompt_tokens=1000), Grant)
    assert grant.due is not None
    assert grant.due.needed_s == pytest.approx(0.11, rel=0.1)
    assert state.prefill_tokens_per_s == pytest.approx(1000, rel=0.1)  # of tokens that were computed


def test_slack_of_the_queue_is_told() -> None:
    router = ByHand(config(model("chat")))
    assert (router.state("chat").slack_s, router.state("chat").late) == (None, 0)
    router.submit("r1", ttft_s=5.0)
    router.submit("r2", ttft_s=60.0)
    assert router.state("chat").slack_s == pytest.approx(5.0, abs=0.1)
    router.now += 6.0
    assert router.state("chat").slack_s == pytest.approx(-1.0, abs=0.1)
    assert router.state("chat").late == 1


def test_request_that_would_not_fit_waits_until_memory_comes_free() -> None:
    """Nothing is free beside the floors: 50 MiB at 64 KiB a token, 800 tokens."""
    router = ByHand(config(model("chat"), budget_mib=250))
    router.hello("chat", facts(kv_bytes_per_token=65536))
    assert granted(router.submit("r1", prompt_tokens=350, max_new_tokens=100)) == ["r1"]
    assert granted(router.submit("r2", prompt_tokens=310, max_new_tokens=200)) == []  # on average 400 and 410
    assert granted(router.submit("r3", prompt_tokens=100, max_new_tokens=100)) == []  # not before r2
    assert granted(router.first_token("r1")) == []
    assert granted(router.finish("r1")) == ["r2", "r3"]


def test_request_that_fits_nowhere_is_for_the_engine_to_refuse() -> None:
    router = ByHand(config(model("chat"), budget_mib=250))
    router.hello("chat", facts(kv_bytes_per_token=65536))
    assert granted(router.submit("r1", prompt_tokens=10**6)) == ["r1"]


def test_expected_answers_follow_what_was_answered() -> None:
    router = ByHand(config(model("chat"), budget_mib=250))
    router.hello("chat", facts(kv_bytes_per_token=65536))
    for i in range(70):
        router.submit(f"r{i}", max_new_tokens=0)
        answer(router, f"r{i}", 0.01, prompt=10, answer=30)
    assert router.state("chat").answer_tokens == 30
    # 380 + half of 30 expected, twice: within 800. Half of what is allowed were 300 each.
    assert granted(router.submit("a", prompt_tokens=380, max_new_tokens=600)) == ["a"]
    assert granted(router.submit("b", prompt_tokens=380, max_new_tokens=600)) == ["b"]


def test_neighbours_expectations_are_not_room() -> None:
    router = ByHand(config(model("chat"), model("code"), budget_mib=550))
    for name in ("chat", "code"):
        router.hello(name, facts(kv_bytes_per_token=65536, ceiling_bytes=500 * MIB))
    # 50 MiB free beside two floors of 50: code takes 90 of them, 10 of the free ones are left for chat.
    router.submit("c1", "code", prompt_tokens=1390, max_new_tokens=100)
    assert granted(router.submit("r1", prompt_tokens=800, max_new_tokens=100)) == ["r1"]
    assert granted(router.submit("r2", prompt_tokens=100, max_new_tokens=100)) == []
    router.first_token("c1", "code")
    assert granted(router.finish("c1", "code")) == ["r2"]


def test_urgent_request_of_another_model_goes_first_on_the_device() -> None:
    """Both engines have a prefill to do, so both wait for the window of the device."""
    router = awake("chat", "code", prefill_window=2)
    router.submit("a0", "chat", prompt_tokens=2000)
    router.submit("b0", "code", prompt_tokens=2000)
    assert granted(router.submit("a1", "chat", ttft_s=9.0, prompt_tokens=500)) == []
    assert granted(router.submit("b1", "code", ttft_s=3.0, prompt_tokens=500)) == []
    assert granted(router.submit("a2", "chat", ttft_s=6.0, prompt_tokens=500)) == []
    order = granted(router.first_token("a0", "chat"))
    order += granted(router.first_token("b0", "code"))
    for name, request in (("code", "b1"), ("chat", "a2"), ("chat", "a1")):
        order += granted(router.first_token(request, name)) if request in order else []
    assert order.index("b1") < order.index("a1")
    assert order.index("a2") < order.index("a1")


def test_short_prompts_are_let_in_beyond_the_count() -> None:
    """At 2,048 tokens a second, until something is learned: 250 ms are 512 tokens."""
    router = awake(prefill_window=2, max_running_requests=100)
    assert [bool(granted(router.submit(f"r{i}", prompt_tokens=128))) for i in range(6)] == [True] * 4 + [
        False
    ] * 2
    router = awake(prefill_window=2)
    assert [bool(granted(router.submit(f"r{i}", prompt_tokens=1024))) for i in range(4)] == [True] * 2 + [
        False
    ] * 2


def test_aged_requests_take_turns_with_those_that_can_be_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue of old ones that are late, and always new ones with time: of four grants one is for an old one."""
    monkeypatch.setattr(grants, "WINDOW_US", 0)
    router = awake(prefill_window=1, max_running_requests=100)
    router.submit("now", prompt_tokens=4000)
    for i in range(10):
        router.submit(f"old{i}", waited_s=11.0 + 0.1 * (10 - i), prompt_tokens=600)
    served, last = [], "now"
    for i in range(24):
        router.submit(f"new{i}", ttft_s=100.0, prompt_tokens=600)
        router.now += 0.01
        [last, *_] = granted(router.first_token(last))
        served.append(last)
    places = [place for place, request in enumerate(served) if request.startswith("old")]
    assert [served[place] for place in places] == [f"old{i}" for i in range(len(places))]
    assert all(after - before == 4 for before, after in itertools.pairwise(places)), served


def test_who_comes_behind_a_long_queue_without_kv_is_looked_at_soon() -> None:
    """The queue waits for KV that one long answer holds; a small urgent request fits beside that."""
    router = ByHand(config(model("chat"), budget_mib=300, max_queue=100))
    router.hello("chat", facts(max_request_tokens=60000, max_running_requests=64, ceiling_bytes=50 * MIB))
    router.submit("long", prompt_tokens=30000, max_new_tokens=10000)
    router.first_token("long")
    for number in range(80):
        assert granted(router.submit(f"big{number}", prompt_tokens=30000)) == []
    commands = router.submit("urgent", priority=5)
    assert granted(commands + router.wait(0.01)) == ["urgent"]


def test_what_nobody_may_be_granted_is_not_ordered_at_each_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 requests for a model whose window is full: long queues are ordered at intervals, here of 15 ms."""
    router, orders = ByHand(config(model("chat"), max_queue=300)), []
    router.hello("chat")

    def order(waiting: list[Request], *args: Any, **keys: Any) -> list[Request]:
        orders.append(len(waiting))
        return original(waiting, *args, **keys)

    original = dispatch.order
    for number in range(10):
        router.submit(f"r{number}")
        router.first_token(f"r{number}")
    monkeypatch.setattr(dispatch, "order", order)
    for number in range(300):
        assert granted(router.submit(f"q{number}")) == []
    assert len(orders) <= 70, "each time up to 64 in the queue, as _ALWAYS_ORDER says, and no more"
    router.now += 0.1
    assert len(granted(router.finish("r0"))) == 1
