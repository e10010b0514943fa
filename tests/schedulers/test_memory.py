"""Who sleeps so that who may wake."""

from __future__ import annotations

import pytest

from prism_sgl.config import SchedulerConfig
from prism_sgl.messages import (
    ApiHello,
    Hello,
    Lost,
    RequestId,
    RequestKey,
    RuntimeState,
    Sleep,
    SleepRefused,
    SupervisorHello,
    WakeFailed,
)
from prism_sgl.schedulers.memory_plan import Resident, Room, Tally, find_room
from tests.schedulers.by_hand import (
    MIB,
    ByHand,
    config,
    facts,
    granted,
    model,
    of,
    refusals,
    replies,
    slept_models,
    started_models,
    woken_models,
)


def three(**keys: float) -> ByHand:
    """third, then chat and code were started; two fit, so third sleeps. Both others have served."""
    router = ByHand(config(model("third"), model("chat"), model("code"), **keys))  # type: ignore[arg-type]
    router.start_all()
    router.now += 100
    for name in ("chat", "code"):
        router.submit(f"first-{name}", name)
        router.finish(f"first-{name}", name)
    assert [router.state(name).state for name in ("third", "chat", "code")] == ["asleep", "awake", "awake"]
    return router


def test_models_start_one_after_the_other_in_a_budget_that_holds_one() -> None:
    router = ByHand(config(model("chat"), model("code"), model("third"), budget_mib=300))
    assert [c.message.model for c in router.all if hasattr(c.message, "device")] == ["chat"]  # type: ignore[union-attr]
    commands = router.hello("chat")
    assert slept_models(commands) == ["chat"]
    assert started_models(router.slept(router.id("chat"))) == ["code"]
    router.start_all()
    assert [router.state(name).state for name in ("chat", "code", "third")] == ["asleep", "asleep", "awake"]


def test_no_more_engines_start_at_a_time_than_allowed() -> None:
    router = ByHand(config(model("chat"), model("code"), model("third"), budget_mib=900, start_parallel=2))
    assert started_models(router.all) == ["chat", "code"]
    assert started_models(router.hello("chat")) == ["third"]


def test_model_without_preload_starts_at_its_first_request() -> None:
    router = ByHand(config(model("chat", preload=False)))
    assert started_models(router.all) == []
    assert started_models(router.submit("r1")) == ["chat"]
    assert granted(router.hello("chat")) == ["r1"]


def test_longest_idle_model_sleeps_for_one_with_a_request() -> None:
    router = three()
    router.now += 100
    router.submit("r1", "code")
    router.finish("r1", "code")
    commands = router.submit("r2", "third")
    assert slept_models(commands) == ["chat"]
    assert woken_models(router.slept(router.id("chat"))) == ["third"]
    assert granted(router.woke("third")) == ["r2"]
    assert "third wants 250MiB" in "\n".join(router.controller.status(router.now).events)


def test_model_that_just_woke_stays_a_while() -> None:
    router = ByHand(config(model("chat"), model("code"), budget_mib=300, min_residence_s=2.0))
    router.start_all()
    assert slept_models(router.submit("r1", "chat")) == ["code"]  # never asked for anything: no time to stay
    router.slept(router.id("code"))
    router.woke("chat")
    router.finish("r1", "chat")
    assert slept_models(router.submit("r2", "code") + router.wait(1.9)) == []
    assert slept_models(router.wait(0.2)) == ["chat"]


def test_pinned_model_never_sleeps() -> None:
    router = ByHand(config(model("chat", pin=True), model("code", pin=True), model("third", preload=False)))
    router.start_all()
    router.now += 1000
    commands = router.submit("r1", "third")
    assert refusals(commands) == [("r1", 503, "no_room")]
    assert slept_models(commands + router.wait(100)) == []


def test_busy_models_take_turns_when_a_request_has_waited_long_enough() -> None:
    router = three(max_wait_s=10.0)
    router.now += 50
    router.submit("a", "chat")
    router.submit("b", "code")
    assert slept_models(router.submit("c", "third") + router.wait(9)) == []
    router.wait(2)
    assert router.state("chat").state == "draining"  # it has been awake longest
    assert granted(router.submit("held", "chat")) == []
    assert slept_models(router.finish("a", "chat")) == ["chat"]
    assert woken_models(router.slept(router.id("chat"))) == ["third"]
    assert granted(router.woke("third")) == ["c"]
    router.wait(11)  # now the held one's turn is due
    assert router.state("code").state == "draining" or router.state("third").state == "draining"


def test_answers_that_do_not_end_in_time_wait_for_the_next_turn() -> None:
    router = ByHand(config(model("chat"), model("code", preload=False), budget_mib=300, max_wait_s=10.0))
    router.start_all()
    router.submit("long", "chat")
    router.submit("unanswered", "chat")
    router.first_token("long", "chat")
    router.submit("b", "code")
    router.wait(10.5)
    assert router.state("chat").state == "draining"
    assert of(router.wait(9), Sleep) == []
    (sleep,) = of(router.wait(1.5), Sleep)
    assert sleep.preempt and sleep.keep_weights
    assert started_models(router.slept(router.id("chat"))) == ["code"]
    assert granted(router.hello("code")) == ["b"], "what waits in a sleeping engine fills no window"
    router.first_token("b", "code")
    # Its turn comes as the other's did: it waits, the other drains, and is set aside.
    router.wait(10.5)
    assert router.state("code").state == "draining"
    assert slept_models(router.finish("b", "code")) == ["code"]
    assert woken_models(router.slept(router.id("code"))) == ["chat"]
    router.woke("chat")
    router.first_token("unanswered", "chat")
    router.finish("long", "chat")
    router.finish("unanswered", "chat")
    assert router.state("chat").in_flight == 0


def test_set_aside_requests_of_a_runtime_that_dies_asleep_are_lost_like_others() -> None:
    router = ByHand(config(model("chat"), model("code", preload=False), budget_mib=300, max_wait_s=10.0))
    router.start_all()
    router.submit("long", "chat")
    router.submit("b", "code")
    router.wait(21)
    router.slept(router.id("chat"))
    assert [lost.request for lost in of(router.exit("chat"), Lost)] == ["long"]


def test_router_that_starts_anew_wakes_whoever_has_requests_set_aside() -> None:
    old = ByHand(config(model("chat")))
    old.start_all()
    new = ByHand(config(model("chat")), epoch=2, hello=False)
    new.api(ApiHello(api="api", granted=[(RequestKey(RequestId("long"), 1), old.id("chat"))]))
    new.supervisor(SupervisorHello(alive=[old.id("chat")]))
    told = Hello(
        runtime=old.id("chat"),
        model="chat",
        device="host0",
        state=RuntimeState.ASLEEP,
        facts=facts(),
        running=[RequestKey(RequestId("long"), 1)],
    )
    assert woken_models(new.runtime(told)) == ["chat"]


def test_turn_falls_on_the_lowest_priority() -> None:
    router = ByHand(
        config(model("chat", priority=5), model("code", priority=1), model("third", preload=False))
    )
    router.start_all()
    router.submit("a", "chat")
    router.submit("b", "code")
    router.submit("c", "third")
    router.wait(11)
    assert [router.state(name).state for name in ("chat", "code")] == ["awake", "draining"]


def test_drain_is_called_off_when_nobody_wants_the_room_any_more() -> None:
    from prism_sgl.messages import Abandon, RequestId

    router = ByHand(config(model("chat"), model("code", preload=False), budget_mib=300))
    router.start_all()
    router.submit("a", "chat")
    router.submit("b", "code")
    router.wait(11)
    assert router.state("chat").state == "draining"
    router.submit("held", "chat")
    assert granted(router.api(Abandon(request=RequestId("b")))) == ["held"]
    assert router.state("chat").state == "awake"


def test_sleep_refused_leaves_the_model_awake() -> None:
    router = ByHand(config(model("chat"), model("code", preload=False), budget_mib=300))
    router.start_all()
    router.submit("b", "code")
    router.runtime(SleepRefused(runtime=router.id("chat"), reason="busy"))
    assert router.state("chat").state == "awake"
    assert slept_models(router.wait(3)) == ["chat"]


def test_model_bigger_than_what_is_not_pinned_is_refused_with_the_reason() -> None:
    router = ByHand(config(model("chat", pin=True), model("big", preload=False, weights_bytes=400 * MIB)))
    router.start_all()
    commands = router.submit("r1", "big")
    assert refusals(commands) == [("r1", 503, "no_room")]
    assert "450MiB" in router.state("big").reason


def test_wake_that_finds_no_memory_is_tried_again() -> None:
    router = three()
    router.now += 100
    router.submit("r1", "third")
    router.start_all()
    failed = WakeFailed(runtime=router.id("third"), reason="no room")
    commands = router.runtime(failed)
    assert woken_models(commands) == []
    assert router.state("third").state == "asleep"
    assert woken_models(router.wait(0.25)) == ["third"]
    router.runtime(failed)
    assert woken_models(router.wait(0.3)) == []
    assert woken_models(router.wait(0.2)) == ["third"]
    assert granted(router.woke("third")) == ["r1"]


def test_runtime_that_ends_in_a_wake_has_failed_and_is_started_anew() -> None:
    router = three()
    router.now += 100
    router.submit("r1", "third")
    router.start_all()
    old = router.id("third")
    router.exit("third", reason="exit code 1")
    assert router.state("third").state == "failed"
    assert {router.state(name).state for name in ("chat", "code")} <= {"awake", "asleep"}
    router.wait(2)
    assert router.id("third") != old
    assert granted(router.hello("third")) == ["r1"]


@pytest.mark.parametrize(("idle_s", "sleeps"), [(4.0, []), (6.0, ["code"])])
def test_idle_model_sleeps_when_an_engine_wants_kv(idle_s: float, sleeps: list[str]) -> None:
    router = ByHand(config(model("chat"), model("code"), min_residence_s=5.0))
    router.start_all()
    for name in ("chat", "code"):
        router.submit(f"r-{name}", name)
    router.finish("r-code", "code")
    router.now += idle_s - 2
    router.load("chat", wanted_bytes=10 * MIB, in_flight=1)
    router.now += 2
    assert slept_models(router.load("chat", wanted_bytes=10 * MIB, in_flight=1)) == sleeps


def short_of_kv(**scheduler: float) -> ByHand:
    """50 MiB free, floors of 50 MiB, 64 KiB a token: chat may have 1,600 tokens while code is awake."""
    router = ByHand(config(model("chat"), model("code"), budget_mib=550, **scheduler))
    for name in ("chat", "code"):
        router.hello(name, facts(kv_bytes_per_token=65536, ceiling_bytes=500 * MIB))
        router.submit(f"first-{name}", name)
        router.finish(f"first-{name}", name)
    return router


def test_idle_model_sleeps_for_a_request_that_waits_for_kv() -> None:
    router = short_of_kv(min_residence_s=2.0)
    router.now += 1
    assert granted(router.submit("r1", prompt_tokens=1000)) == ["r1"]
    assert granted(router.submit("r2", prompt_tokens=1000)) == []
    assert slept_models(router.wait(0.9)) == []
    assert slept_models(router.wait(0.2)) == ["code"]
    assert granted(router.slept(router.id("code"))) == ["r2"]


def test_model_that_gave_its_memory_for_kv_wakes_for_its_next_request() -> None:
    router = short_of_kv()
    router.now += 3
    for number in range(2):
        router.submit(f"r{number}", prompt_tokens=1000)
    router.slept(router.id("code"))
    assert woken_models(router.submit("r9", "code")) == ["code"]  # its floor is its own, whatever others hold
    assert granted(router.woke("code")) == ["r9"]


def test_idle_model_sleeps_before_answers_outgrow_the_memory() -> None:
    """Both requests fit as they begin, not at their ends: 1.5 times 1,100 tokens."""
    router = short_of_kv()
    for number in range(2):
        assert granted(router.submit(f"r{number}", prompt_tokens=550)) == [f"r{number}"]
    assert slept_models(router.wait(9.9)) == []
    assert slept_models(router.wait(0.2)) == ["code"]


def test_only_as_many_sleep_as_kv_is_missing() -> None:
    idle = [model(f"idle{number}") for number in range(3)]
    router = ByHand(config(model("chat"), *idle, budget_mib=1050))
    for m in router.controller.status(router.now).models:
        router.hello(m.name, facts(kv_bytes_per_token=65536, ceiling_bytes=900 * MIB))
    router.now += 100
    for number in range(2):
        router.submit(f"r{number}", prompt_tokens=3000)
    commands = router.all[-6:]
    assert slept_models(commands) == ["idle0"]  # 125 MiB missing at the height, 250 given


def test_pinned_model_gives_no_kv() -> None:
    router = ByHand(config(model("chat"), model("code", pin=True), budget_mib=550))
    for name in ("chat", "code"):
        router.hello(name, facts(kv_bytes_per_token=65536, ceiling_bytes=500 * MIB))
    for number in range(2):
        router.submit(f"r{number}", prompt_tokens=1000)
    assert slept_models(router.all + router.wait(100)) == []


def test_facts_larger_than_the_files_told_send_an_idle_model_to_sleep() -> None:
    router = ByHand(config(model("chat", weights_bytes=0), model("code", weights_bytes=0)))
    router.hello("chat", facts(weights_bytes=400 * MIB))
    commands = router.hello("code", facts(weights_bytes=400 * MIB))
    assert len(of(commands, Sleep)) == 1


def test_device_that_promised_too_much_is_even_once_somebody_is_idle() -> None:
    router = ByHand(config(model("chat"), model("code"), budget_mib=520))
    for name in ("chat", "code"):
        router.submit(name, name)
    for name in ("chat", "code"):
        router.hello(name, facts(overhead_bytes=30 * MIB))
        router.first_token(name, name)
    router.now += 5
    assert slept_models(router.all) == []
    assert slept_models(router.finish("chat", "chat")) == ["chat"]


def test_drain_without_an_end_keeps_nobody_waiting() -> None:
    """``chat`` is drained by an operator in the middle of an answer: who wants memory asks the idle one for it."""
    router = ByHand(config(model("chat"), model("idle"), model("want", preload=False)))
    router.start_all()
    for name in ("idle", "chat"):
        router.submit(name, name)
        router.first_token(name, name)
    router.finish("idle", "idle")
    router.now += 5
    assert replies(router.admin("drain")) == []
    assert slept_models(router.submit("r1", "want")) == ["idle"]


def test_operators_wake_calls_an_operators_drain_off() -> None:
    router = ByHand(config(model("chat")))
    router.start_all()
    router.submit("r1")
    router.first_token("r1")
    router.admin("drain", ask="drain")
    assert granted(router.submit("r2")) == []
    commands = router.admin("wake", ask="wake")
    assert replies(commands) == [("drain", 409), ("wake", 200)]
    assert granted(commands) == ["r2"]


def test_small_model_does_not_take_what_an_overdue_big_one_waits_for() -> None:
    big, small = model("big", preload=False, weights_bytes=500 * MIB), model("small", preload=False)
    router = ByHand(config(model("chat"), big, small))
    router.start_all()
    router.submit("a", "chat")
    router.submit("b", "big")
    router.wait(11)
    assert router.state("chat").state == "draining"
    assert started_models(router.submit("c", "small")) == []
    router.finish("a", "chat")
    assert started_models(router.slept(router.id("chat"))) == ["big"]


def test_words_said_twice_or_late_change_nothing() -> None:
    router = ByHand(config(model("chat"), model("code"), budget_mib=300))
    router.start_all()
    router.submit("r1", "chat")
    router.slept(router.id("code"))
    router.woke("chat")
    router.finish("r1", "chat")
    router.now += 5
    router.submit("r2", "code")
    router.slept(router.id("chat"))
    assert router.state("code").state == "waking"
    assert router.slept(router.id("code")) == []
    assert router.woke("chat") == []
    assert [router.state(name).state for name in ("chat", "code")] == ["asleep", "waking"]


def test_sleeping_model_moves_when_the_rest_of_its_device_is_pinned() -> None:
    router = ByHand(config(model("chat"), model("code"), model("third"), budget_mib=300, devices=2))
    router.start_all()
    asleep, pinned = ("chat", "third") if router.state("chat").state == "asleep" else ("code", "third")
    home = router.state(asleep).device
    assert router.state(pinned).device == home
    router.admin("pin", pinned)
    router.submit("r1", asleep)
    assert router.state(asleep).state == "stopping"
    router.exit(asleep, expected=True)
    router.start_all()
    assert router.state(asleep).device not in (None, home)
    assert granted(router.all) == ["r1"]


def test_model_goes_only_where_it_may() -> None:
    router = ByHand(config(model("chat"), model("code", devices=("host0",)), budget_mib=300, devices=2))
    router.start_all()
    assert router.state("code").device == "host0"


def resident(name: str, gives_bytes: int, since: float, *, busy: bool = False) -> Resident:
    return Resident(name, gives_bytes, False, busy, True, 0, since, since)


def room_of(needed_bytes: int, *residents: Resident) -> Room:
    """For a request that has waited its time, at 1000 s, where nothing is free."""
    tally = Tally(0, 0)
    return find_room(
        needed_bytes, tally, residents, 1000.0, SchedulerConfig(), urgent=True, waits_since=900.0
    )


def test_nobody_gives_what_others_make_superfluous() -> None:
    small, big = resident("small", 10, 100.0), resident("big", 100, 200.0)
    assert room_of(10, small, big).sleep == ("small",), "the longest idle first"
    assert room_of(100, small, big).sleep == ("big",), "it gives all that is wanted"
    assert room_of(105, small, big).sleep == ("small", "big")
    busy, wide = resident("busy", 10, 100.0, busy=True), resident("wide", 100, 200.0, busy=True)
    turn = room_of(100, small, busy, wide)
    assert (turn.sleep, turn.drain) == ((), ("wide",))
    turn = room_of(110, small, busy, wide)
    assert (turn.sleep, turn.drain) == (("small",), ("wide",)), "idle ones before busy ones"
