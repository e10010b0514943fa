"""Moves step by step: target first, switch, drain; and what is left when one of the two dies."""

from __future__ import annotations

import math

from prism_sgl.messages import (
    AdminReply,
    AskAdmin,
    Finished,
    FirstToken,
    Grant,
    Hello,
    Load,
    Lost,
    RequestId,
    RuntimeExited,
    RuntimeId,
    RuntimeState,
    Sleep,
    SleepRefused,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    Wake,
    WakeFailed,
    Woke,
)
from prism_sgl.schedulers.controller import Command
from prism_sgl.schedulers.records import Role
from tests.schedulers.by_hand import (
    MIB,
    ByHand,
    config,
    facts,
    granted,
    hello_of,
    model,
    of,
    replies,
    started_models,
    woken_models,
)

OLD, NEW = RuntimeId("chat@host0.1-1"), RuntimeId("chat@host1.1-2")


def two_devices(*models: str, **keys: object) -> ByHand:
    """``chat`` is awake on host0, host1 is empty."""
    router = ByHand(config(*(model(name) for name in models or ("chat",)), devices=2, **keys))  # type: ignore[arg-type]
    router.start_all()
    router.now += 5
    return router


def move(router: ByHand, device: str = "host1", name: str = "chat") -> list[Command]:
    return router.api(AskAdmin(ask="move", verb="move", model=name, device=device))


def hello(router: ByHand, runtime: RuntimeId, state: RuntimeState = RuntimeState.AWAKE) -> list[Command]:
    return router.runtime(hello_of(runtime, state, start_s=1.0))


def exit_of(router: ByHand, runtime: RuntimeId, *, expected: bool = False) -> list[Command]:
    return router.supervisor(RuntimeExited(runtime=runtime, reason="killed by signal 9", expected=expected))


def finish(router: ByHand, request: str, runtime: RuntimeId) -> list[Command]:
    return router.runtime(
        Finished(
            runtime=runtime,
            request=RequestId(request),
            attempt=1,
            outcome="ok",
            status=200,
            total_s=0.1,
        )
    )


def runtimes_of(commands: list[Command]) -> list[str]:
    return [grant.runtime for grant in of(commands, Grant)]


def stopped(commands: list[Command]) -> list[str]:
    return [stop.runtime for stop in of(commands, StopRuntime)]


def test_source_serves_until_the_target_is_awake_then_drains_and_is_stopped() -> None:
    router = two_devices()
    assert runtimes_of(router.submit("r1")) == [OLD]
    assert [start.runtime for start in of(move(router), StartRuntime)] == [NEW]
    assert runtimes_of(router.submit("r2")) == [OLD]
    assert (router.state("chat").device, router.state("chat").others[0].role) == ("host0", "incoming")
    commands = hello(router, NEW)
    assert replies(commands) == [("move", 200)]
    assert stopped(commands) == []
    assert runtimes_of(router.submit("r3")) == [NEW]
    assert (router.state("chat").device, router.state("chat").in_flight) == ("host1", 3)
    assert stopped(finish(router, "r1", OLD)) == []
    assert stopped(finish(router, "r2", OLD)) == []  # its last bytes may be on their way
    assert stopped(router.wait(0.9)) == []
    assert stopped(router.wait(1.2)) == [OLD]
    exit_of(router, OLD, expected=True)
    status = router.state("chat")
    assert (status.moves, status.others, status.in_flight) == (1, [], 1)


def test_source_that_does_not_drain_is_stopped_at_its_deadline() -> None:
    router = two_devices(move_drain_s=20.0)
    router.submit("r1")
    move(router)
    hello(router, NEW)
    assert stopped(router.wait(19)) == []
    assert stopped(router.wait(2)) == [OLD]
    assert [r.request for r in of(exit_of(router, OLD, expected=True), Lost)] == ["r1"]


def test_target_that_does_not_start_costs_nothing_but_the_move() -> None:
    router = two_devices()
    move(router)
    [answer] = of(exit_of(router, NEW), AdminReply)
    assert answer.status == 409
    assert answer.message.endswith("it did not move: the runtime on host1 did not come up")
    status = router.state("chat")
    assert (status.state, status.device, status.others, status.moves) == ("awake", "host0", [], 0)
    assert runtimes_of(router.submit("r1")) == [OLD]
    explanation = router.api(AskAdmin(ask="e", verb="explain", model="chat"))
    assert "stays 120 s more after its last move, or the last try" in of(explanation, AdminReply)[0].message


def test_source_that_dies_in_a_move_leaves_its_queue_to_the_target() -> None:
    router = two_devices()
    router.submit("r1")
    move(router)
    router.first_token("r1")
    exit_of(router, OLD)
    assert (router.state("chat").state, router.state("chat").device) == ("starting", "host1")
    assert granted(router.submit("r2")) == []
    assert started_models(router.wait(5)) == [], "one start is under way already"
    assert granted(hello(router, NEW)) == ["r2"]


def test_target_that_dies_after_the_switch_gives_the_model_back_to_the_source() -> None:
    router = two_devices()
    router.submit("r1")
    move(router)
    hello(router, NEW)
    exit_of(router, NEW)
    status = router.state("chat")
    assert (status.state, status.device, status.others) == ("awake", "host0", [])
    assert runtimes_of(router.submit("r2")) == [OLD]


def test_refusals_of_moves_say_why() -> None:
    router = two_devices("chat", "code")

    def reply(device: str, name: str = "chat") -> tuple[int, str]:
        [answer] = of(move(router, device, name), AdminReply)
        return answer.status, answer.message

    assert reply("host7") == (409, "chat can't move to host7: no such device")
    assert reply("host0") == (200, "chat is awake (started in 0.0 s), on host0")
    router.admin("pin")
    assert reply("host1") == (409, "chat is pinned; unpin it first")
    router.admin("unpin")
    router.admin("sleep")
    router.slept(router.id("chat"))
    assert reply("host1") == (409, "chat is asleep; one that is awake can move")


def test_room_on_the_target_is_made_of_idle_models_and_never_of_busy_ones() -> None:
    router = two_devices("chat", "x", "y", "z", budget_mib=500)
    on_target = [name for name in ("x", "y", "z") if router.state(name).device == "host1"]
    assert len(on_target) == 2
    for name in on_target:
        router.submit(f"r-{name}", name)
    [answer] = of(move(router), AdminReply)
    assert answer.status == 409
    assert answer.message.endswith("it did not move: no room on host1"), "both are busy"
    for name in on_target:
        router.finish(f"r-{name}", name)
    router.now += 200
    commands = move(router)
    assert len([c for c in commands if type(c.message).__name__ == "Sleep"]) == 1
    asleep = next(name for name in on_target if router.state(name).state == "draining")
    assert [s.model for s in of(router.slept(router.id(asleep)), StartRuntime)] == ["chat"]


def one_beside_another(**keys: float) -> ByHand:
    """Each device holds one awake: ``chat`` and ``x`` live on host0, ``x`` is awake and answers; ``y`` is on host1."""
    models = (model("x", devices=("host0",)), model("y", devices=("host1",)), model("chat", preload=False))
    router = ByHand(config(*models, budget_mib=300, devices=2, **keys))  # type: ignore[arg-type]
    router.start_all()
    router.now += 5
    router.submit("busy", "y")
    router.submit("first", "chat")
    router.start_all()
    assert router.state("chat").device == "host0"
    router.finish("first", "chat")
    router.finish("busy", "y")
    router.now += 5
    return router


def test_model_that_waits_for_memory_moves_where_there_is_room() -> None:
    router = one_beside_another()
    router.submit("long", "x")
    router.slept(router.id("chat"))
    router.woke("x")
    assert started_models(router.submit("r1", "chat")) == []  # y is idle, and not yet for long
    router.admin("sleep", "y")
    (start,) = of(router.slept(router.id("y")) + router.wait(1.1), StartRuntime)
    assert start.runtime.startswith("chat@host1")
    assert router.state("chat").others[0].role == "incoming"
    assert granted(hello(router, start.runtime)) == ["r1"]
    status = router.state("chat")
    assert (status.device, status.moves) == ("host1", 1)
    assert stopped(router.all)[-1].startswith("chat@host0"), "it slept there with nothing in flight"
    assert router.state("x").in_flight == 1


def test_model_that_could_wake_meanwhile_does_not_move() -> None:
    router = one_beside_another()
    router.submit("long", "x")
    router.slept(router.id("chat"))
    router.woke("x")
    router.submit("r1", "chat")
    router.admin("sleep", "y")
    (start,) = of(router.slept(router.id("y")) + router.wait(1.1), StartRuntime)
    exit_of(router, start.runtime)
    router.finish("long", "x")
    router.now += 3
    router.tick()
    router.slept(router.id("x"))
    assert granted(router.woke("chat")) == ["r1"]
    assert router.state("chat").device == "host0"


def test_target_is_given_up_if_the_source_was_set_aside_meanwhile() -> None:
    """Requests set aside go on in the engine that has them."""
    router = one_beside_another(max_wait_s=10.0)
    router.admin("sleep", "y")
    router.slept(router.id("y"))
    router.submit("long", "chat")
    router.first_token("long", "chat")
    (start,) = of(move(router), StartRuntime)
    router.submit("r-x", "x")
    router.wait(21)
    router.slept(router.id("chat"))
    router.woke("x")
    hello(router, start.runtime)
    assert (router.state("chat").device, router.state("chat").state) == ("host0", "asleep")
    assert stopped(router.wait(1.5)) == [start.runtime]
    exit_of(router, start.runtime, expected=True)
    router.finish("r-x", "x")
    router.wait(3)
    assert woken_models(router.slept(router.id("x"))) == ["chat"]
    router.woke("chat")
    router.finish("long", "chat")
    assert router.state("chat").in_flight == 0


def test_router_that_starts_in_the_middle_of_a_move_ends_it_with_one_runtime() -> None:
    for first in (OLD, NEW):
        router = ByHand(config(model("chat"), devices=2), epoch=2, hello=False)
        router.supervisor(SupervisorHello(alive=[NEW, OLD]))
        second = NEW if first is OLD else OLD
        commands = hello(router, first)
        assert router.state("chat").state == "awake"
        assert router.state("chat").runtime == first
        commands += hello(router, second)
        assert router.state("chat").runtime == NEW, "the younger one was the target"
        commands += router.wait(3)
        assert stopped(commands) == [OLD]
        exit_of(router, OLD, expected=True)
        assert router.state("chat").others == []


def test_target_that_an_earlier_router_started_may_come_later() -> None:
    router = ByHand(config(model("chat"), devices=2), epoch=2, hello=False)
    router.supervisor(SupervisorHello(alive=[OLD, NEW]))
    hello(router, OLD)
    assert router.state("chat").others[0].role == "incoming"
    exit_of(router, NEW)  # it did not load
    assert (router.state("chat").state, router.state("chat").others) == ("awake", [])


class _Load:
    """Requests of one model, a few a second, each answered after a time."""

    def __init__(self, router: ByHand) -> None:
        self.router = router
        self.number = 0
        self.grants = 0

    def run(self, seconds: float, models: list[str], rate: float = 5.0) -> list[Command]:
        router, commands = self.router, []
        end = router.now + seconds
        while router.now < end:
            for name in models:
                self.number += 1
                key = f"r{self.number}"
                before = router.submit(key, name, prompt_tokens=200)
                assert granted(before) == [key]
                commands += before
                self.grants += 1
                runtime = of(before, Grant)[0].runtime
                answer = {"runtime": runtime, "request": RequestId(key), "attempt": 1}
                commands += router.runtime(FirstToken(**answer, ttft_s=0.08))  # type: ignore[arg-type]
                commands += router.runtime(
                    Finished(
                        **answer,  # type: ignore[arg-type]
                        outcome="ok",
                        status=200,
                        total_s=0.5,
                        prompt_tokens=200,
                        completion_tokens=10,
                    )
                )
            self._carry_out(commands)
            commands += router.wait(1 / rate)
        return commands

    def _carry_out(self, commands: list[Command]) -> None:
        """Engines start at once and end at once."""
        fleet = self.router.controller._fleet
        for start in of(commands[-50:], StartRuntime):
            runtime = fleet.by_id(start.runtime)
            if runtime is not None and not runtime.known:
                told = {"model": start.model, "device": start.device, "state": RuntimeState.AWAKE}
                self.router.runtime(Hello(runtime=start.runtime, facts=facts(), start_s=1.0, **told))  # type: ignore[arg-type]
        for stop in of(commands[-50:], StopRuntime):
            if fleet.by_id(stop.runtime) is not None:
                exit_of(self.router, stop.runtime, expected=True)


def test_busy_pair_is_parted_once_and_there_is_no_thrash() -> None:
    names = ("a", "b", "c", "d")
    router = ByHand(config(*(model(name) for name in names), devices=2, budget_mib=1000))
    router.start_all()
    load = _Load(router)
    hot = [name for name in names if router.state(name).device == "host0"]
    assert len(hot) == 2
    load.run(60, hot)
    assert sum(router.state(name).moves for name in names) == 1
    assert len({router.state(name).device for name in hot}) == 2
    load.run(300, hot)
    assert sum(router.state(name).moves for name in names) == 1, "what is even stays"


def test_flips_are_bounded_whatever_shifts() -> None:
    """Load jumps between pairs each 20 s, faster than any move can follow."""
    names = ("a", "b", "c", "d")
    router = ByHand(config(*(model(name) for name in names), devices=2, budget_mib=1000))
    router.start_all()
    load = _Load(router)
    for number in range(15):
        on = "host0" if number % 2 else "host1"
        hot = [name for name in names if router.state(name).device == on][:2] or list(names[:2])
        load.run(20, hot, rate=4.0)
    minutes = 15 * 20 / 60
    for name in names:
        assert router.state(name).moves <= 2 * minutes, "a model stays for half a window"


def test_explain_has_all_devices_and_what_would_have_to_change() -> None:
    router = two_devices("chat", "code")
    _Load(router).run(30, ["chat", "code"])
    [reply] = of(router.api(AskAdmin(ask="e", verb="explain", model="chat")), AdminReply)
    lines = reply.message.splitlines()
    assert lines[0] == "chat: awake on host0 (started in 0.0 s)"
    assert lines[1].startswith("it asks for 0.")
    assert lines[2].startswith("host0: pressure ")
    assert "the move would bring the larger of the two from" in lines[3]
    assert lines[4].startswith("it moves if that lowers the largest pressure by 10% and what its start costs")
    assert replies(router.api(AskAdmin(ask="e", verb="explain", model="nobody"))) == [("e", 404)]


def test_one_device_has_no_passes() -> None:
    router = ByHand(config(model("chat")))
    router.start_all()
    router.submit("r1")
    router.finish("r1")
    assert router.controller.next_tick(router.now) is None


# ---------------------------------------------------------------- spares


def with_spare() -> tuple[ByHand, RuntimeId]:
    """``chat`` is awake on host0, and its spare sleeps on host1."""
    router = ByHand(config(model("chat"), devices=2, spares=True))
    router.start_all()
    status = router.state("chat")
    spare = RuntimeId("chat@host1.1-2")
    assert [(other.runtime, other.role) for other in status.others] == [(spare, "spare")]
    hello(router, spare)
    router.slept(spare)
    assert router.state("chat").others[0].state == "asleep"
    router.now += 5
    return router, spare


def test_spare_is_started_once_all_is_calm_and_sleeps_at_once() -> None:
    router, spare = with_spare()
    assert [s.runtime for s in of(router.all, StartRuntime)] == [OLD, spare]
    assert [s.runtime for s in of(router.all, Sleep)] == [spare]
    assert started_models(router.wait(100)) == []


def test_move_to_a_spare_takes_a_wake_and_leaves_the_source_asleep() -> None:
    router, spare = with_spare()
    router.submit("r1")
    commands = move(router)
    assert started_models(commands) == []
    assert [wake.runtime for wake in of(commands, Wake)] == [spare]
    assert replies(router.runtime(Woke(runtime=spare, seconds=0.3))) == [("move", 200)]
    assert runtimes_of(router.submit("r2")) == [spare]
    assert [sleep.runtime for sleep in of(finish(router, "r1", OLD), Sleep)] == [OLD]
    router.slept(OLD)
    assert [(other.runtime, other.state) for other in router.state("chat").others] == [(OLD, "asleep")]
    assert stopped(router.all) == []


def test_spare_that_finds_no_memory_stays_a_spare() -> None:
    router, spare = with_spare()
    move(router)
    failed = router.runtime(WakeFailed(runtime=spare, reason="no memory"))
    assert replies(failed) == [("move", 409)]
    assert (router.state("chat").device, router.state("chat").others[0].role) == ("host0", "spare")


def test_sleeping_model_whose_home_died_wakes_where_its_spare_is() -> None:
    router, spare = with_spare()
    commands = exit_of(router, OLD) + router.submit("r1")
    assert [wake.runtime for wake in of(commands, Wake)] == [spare]
    assert granted(router.runtime(Woke(runtime=spare, seconds=0.3))) == ["r1"]


def test_spare_gives_its_memory_when_idle_models_have_none_to_give() -> None:
    """What it holds asleep is charged; a model that can't be awake otherwise gets that too."""
    overhead = 100 * MIB
    router = ByHand(
        config(
            model("big", preload=False, weights_bytes=500 * MIB, devices=("host1",)),
            model("chat"),
            devices=2,
            spares=True,
        )
    )
    router.start_all()
    spare = RuntimeId("chat@host1.1-2")
    told = {"model": "chat", "device": "host1", "state": RuntimeState.AWAKE}
    router.runtime(Hello(runtime=spare, facts=facts(overhead_bytes=overhead), **told))  # type: ignore[arg-type]
    router.slept(spare)
    router.now += 5
    commands = router.submit("r1", "big")
    assert stopped(commands) == [spare]
    assert started_models(exit_of(router, spare, expected=True)) == ["big"]


def beside_busy() -> tuple[ByHand, RuntimeId]:
    """``chat``'s spare holds 40 MiB of host1, where ``busy`` has 64 KiB a token and 410 MiB are free beside both."""
    models = model("chat"), model("busy", devices=("host1",))
    router = ByHand(config(*models, budget_mib=700, devices=2, spares=True))
    router.hello("busy", facts(kv_bytes_per_token=65536, ceiling_bytes=450 * MIB))
    router.hello("chat")
    [spare] = [start.runtime for start in of(router.all, StartRuntime)][2:]
    router.runtime(hello_of(spare, known=facts(overhead_bytes=40 * MIB)))
    router.slept(spare)
    router.now += 5
    return router, spare


def ask_busy(router: ByHand, count: int) -> None:
    """Each holds 125 MiB on average, 188 at its height; 50 are the floor of all."""
    for number in range(count):
        assert granted(router.submit(f"b{number}", "busy", prompt_tokens=2000)) == [f"b{number}"]
        router.first_token(f"b{number}", "busy")


def test_spare_that_gave_way_to_kv_is_started_again_when_that_has_ended() -> None:
    router, spare = beside_busy()
    ask_busy(router, 3)
    assert stopped(router.all) == [spare]
    assert exit_of(router, spare, expected=True) == []
    assert started_models(router.wait(300)) == []
    for number in range(3):
        router.finish(f"b{number}", "busy")
    assert started_models(router.wait(61)) == ["chat"]


def test_no_spare_starts_in_room_that_requests_will_take() -> None:
    router, spare = beside_busy()
    ask_busy(router, 2)
    assert stopped(router.all) == []
    exit_of(router, spare)
    assert started_models(router.wait(300)) == [], "it needs 290 MiB; of 450 that are free those two take 325"
    for number in range(2):
        router.finish(f"b{number}", "busy")
    assert started_models(router.wait(61)) == ["chat"]


def test_spare_that_would_not_sleep_is_asked_again_later() -> None:
    router, spare = with_spare()
    move(router)
    router.runtime(Woke(runtime=spare, seconds=0.3))
    refused = SleepRefused(runtime=OLD, reason="requests are being answered")
    [sleep] = of(router.all, Sleep)[1:]
    assert sleep.runtime == OLD, "the old home is the spare now"
    assert of(router.runtime(refused), Sleep) == []
    beat = Load(
        runtime=OLD, state=RuntimeState.AWAKE, weights_bytes=0, kv_bytes=0, wanted_bytes=0, in_flight=0
    )
    assert of(router.runtime(beat), Sleep) == []
    router.now += 1.1
    assert [sleep.runtime for sleep in of(router.runtime(beat), Sleep)] == [OLD]


def test_what_a_spare_on_a_smaller_device_may_hold_does_not_bind_the_home() -> None:
    router = ByHand(config(model("chat"), devices=2, budget_mib=700, spares=True))
    router.hello("chat", facts(kv_bytes_per_token=65536, ceiling_bytes=450 * MIB))
    [spare] = [start.runtime for start in of(router.all, StartRuntime)][1:]
    router.runtime(hello_of(spare, known=facts(kv_bytes_per_token=65536, ceiling_bytes=60 * MIB)))
    router.slept(spare)
    router.submit("r1", prompt_tokens=2000)
    router.first_token("r1")
    assert granted(router.submit("r2", prompt_tokens=2000)) == ["r2"], "250 MiB of 450 for both, not of 60"


def test_unload_just_after_a_move_ends_what_leaves_too() -> None:
    router = two_devices()
    router.submit("r1")
    router.first_token("r1")
    move(router)
    hello(router, NEW)
    router.now += 5
    router.runtime(
        Finished(runtime=OLD, request=RequestId("r1"), attempt=1, outcome="ok", status=200, total_s=5.0)
    )
    assert replies(router.admin("unload", ask="b")) == []
    exit_of(router, NEW, expected=True)
    assert stopped(router.wait(2.0))[-1] == OLD, "its last words are out"
    assert replies(exit_of(router, OLD, expected=True)) == [("b", 200)]


def test_unload_ends_the_spare_too_and_sleep_keeps_it() -> None:
    router, spare = with_spare()
    router.admin("sleep")
    router.slept(OLD)
    assert router.state("chat").others[0].role == "spare"
    assert set(stopped(router.admin("unload", ask="b"))) == {OLD, spare}
    exit_of(router, OLD, expected=True)
    assert replies(exit_of(router, spare, expected=True)) == [("b", 200)]


def test_restarted_router_finds_home_and_spare() -> None:
    router = ByHand(config(model("chat"), devices=2, spares=True), epoch=2, hello=False)
    router.supervisor(SupervisorHello(alive=[NEW, OLD]))
    hello(router, OLD, RuntimeState.ASLEEP)
    hello(router, NEW, RuntimeState.AWAKE)
    status = router.state("chat")
    assert (status.runtime, status.state) == (NEW, "awake")
    assert [(other.runtime, other.role) for other in status.others] == [(OLD, "spare")]


def test_model_wakes_on_the_less_pressed_of_its_two_devices() -> None:
    router = ByHand(config(model("chat"), model("busy", devices=("host0",)), devices=2, spares=True))
    router.start_all()
    for _ in range(3):
        for start in of(router.all, StartRuntime):
            if start.device == "host1" and router.controller._fleet.by_id(start.runtime).known is False:  # type: ignore[union-attr]
                hello(router, start.runtime)
                router.slept(start.runtime)
    spare = router.state("chat").others[0]
    assert (spare.device, spare.state) == ("host1", "asleep") or router.state("chat").device == "host1"
    home = router.state("chat").device
    router.admin("sleep")
    router.slept(router.id("chat"))
    _Load(router).run(30, ["busy"])
    router.submit("r1")
    assert router.state("chat").device == "host1", f"it slept on {home} last, where busy is"


def test_replica_begun_in_the_last_pass_is_looked_at_until_it_is_given_up() -> None:
    """Nobody asks any more: without more passes it would stay for ever."""
    router = two_devices()
    controller = router.controller
    balancer, mover = controller._balancer, controller._mover
    router.wait(30)
    assert balancer.next_at == math.inf
    mover.begin(controller._fleet.models["chat"], "host1", router.now, "hot", Role.REPLICA)
    balancer.asked()
    router.wait(6)
    assert balancer.next_at < math.inf, "it has no runtime yet"
    hello(router, NEW)
    assert [other.role for other in router.state("chat").others] == ["replica"]
    router.wait(120)
    assert [other.role for other in router.state("chat").others] in ([], ["leaving"])


def test_replica_is_the_home_when_the_home_gives_way() -> None:
    router = two_devices()
    fleet, mover = router.controller._fleet, router.controller._mover
    mover.begin(fleet.models["chat"], "host1", router.now, "hot", Role.REPLICA)
    router.tick()
    hello(router, NEW)
    status = router.state("chat")
    assert [(other.role, other.state) for other in status.others] == [("replica", "awake")]
    # Two requests go to two runtimes: each to the one that has less to do.
    first = of(router.submit("r1"), Grant)[0].runtime
    second = of(router.submit("r2"), Grant)[0].runtime
    assert {first, second} == {OLD, NEW}
    for request, runtime in (("r1", first), ("r2", second)):
        finish(router, request, runtime)
    router.now += 5
    router.controller._lifecycle.give_way(fleet.models["chat"].runtime, router.now, "others want its memory")
    commands = router.tick()
    assert (router.state("chat").device, router.state("chat").state) == ("host1", "awake")
    assert [sleep.runtime for sleep in of(commands, Sleep)] == [OLD]
    assert stopped(router.slept(OLD)) == [OLD]
    assert runtimes_of(router.submit("r3")) == [NEW]
