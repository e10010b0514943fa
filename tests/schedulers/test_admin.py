"""What operators ask, and when they get their answer."""

from __future__ import annotations

from tests.schedulers.by_hand import (
    ByHand,
    config,
    granted,
    model,
    replies,
    slept_models,
    started_models,
    woken_models,
)


def awake() -> ByHand:
    router = ByHand(config(model("chat")))
    router.start_all()
    return router


def asleep() -> ByHand:
    router = awake()
    router.admin("sleep")
    router.slept(router.id("chat"))
    return router


def test_sleep_is_answered_when_it_sleeps_and_a_request_wakes_it() -> None:
    router = awake()
    commands = router.admin("sleep")
    assert (slept_models(commands), replies(commands)) == (["chat"], [])
    assert replies(router.slept(router.id("chat"))) == [("a", 200)]
    assert replies(router.admin("sleep", ask="again")) == [("again", 200)]
    assert woken_models(router.submit("r1")) == ["chat"]


def test_busy_model_refuses_sleep_but_drains() -> None:
    router = awake()
    router.submit("r1")
    assert replies(router.admin("sleep")) == [("a", 409)]
    assert replies(router.admin("drain", ask="d")) == []
    assert granted(router.submit("r2")) == []
    assert slept_models(router.finish("r1")) == ["chat"]
    commands = router.slept(router.id("chat"))
    assert replies(commands) == [("d", 200)]
    assert woken_models(commands) == ["chat"]  # for r2, which was held


def test_wake_is_answered_when_it_is_awake() -> None:
    router = asleep()
    commands = router.admin("wake", ask="w")
    assert (woken_models(commands), replies(commands)) == (["chat"], [])
    assert router.admin("wake", ask="w") == []  # the same ask twice
    assert replies(router.woke("chat")) == [("w", 200)]
    assert replies(router.admin("wake", ask="again")) == [("again", 200)]


def test_unload_ends_the_process_and_load_starts_it() -> None:
    router = asleep()
    router.admin("unload", ask="u")
    assert router.state("chat").state == "stopping"
    assert replies(router.exit("chat", expected=True)) == [("u", 200)]
    assert router.state("chat").state == "cold"
    assert started_models(router.wait(100)) == []
    assert started_models(router.admin("load", ask="l")) == ["chat"]
    assert replies(router.hello("chat")) == [("l", 200)]


def test_load_tries_a_failed_model_again_at_once() -> None:
    router = ByHand(config(model("chat")))
    router.exit("chat", "no such file")
    assert started_models(router.admin("load", ask="l")) == ["chat"]
    assert replies(router.exit("chat", "no such file")) == [("l", 503)]


def test_pin_keeps_a_model_from_sleeping() -> None:
    router = awake()
    assert replies(router.admin("pin", ask="p")) == [("p", 200)]
    assert router.state("chat").pinned
    assert replies(router.admin("sleep")) == [("a", 409)]
    router.admin("unpin")
    assert slept_models(router.admin("sleep")) == ["chat"]


def test_unknown_model_and_verb_are_refused() -> None:
    router = awake()
    assert replies(router.admin("sleep", "nobody")) == [("a", 404)]
    assert replies(router.admin("explode")) == [("a", 400)]
