"""A plan of faults and what must hold while and after it: the controller in deterministic simulation."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from random import Random

from prism_sgl.config import (
    Config,
    DeviceConfig,
    MemoryConfig,
    ModelConfig,
    SchedulerConfig,
    ServerConfig,
    Slo,
)
from prism_sgl.messages import (
    AskAdmin,
    Grant,
    Lost,
    Refuse,
    RequestId,
    RuntimeFacts,
    RuntimeId,
    StartRuntime,
    Wake,
)
from prism_sgl.schedulers.controller import Command, ToApi
from prism_sgl.schedulers.simulator import Costs, World

MIB = 1 << 20
WEIGHTS, FLOOR, OVERHEAD = 300 * MIB, 100 * MIB, 20 * MIB
APIS = ("api0", "api1")


@dataclass(frozen=True)
class Plan:
    """All that decides a run."""

    seed: int
    num_models: int
    num_devices: int
    models_a_device: int  # that fit awake at the same time
    num_requests: int
    num_kills: int
    num_router_restarts: int
    share_abandoned: float
    share_doubled: float  # of messages that come twice
    slowest_s: float  # delay of a message
    loads_fail: bool
    wakes_fail: bool
    overhead_known: bool  # False: engines hold more than their files told
    pinned: bool
    num_moves: int  # asked for by an operator, at random times, of whatever model to whatever device
    kills_of_movers: int  # deaths of a source or a target while its model has two runtimes
    spares: bool  # models sleep on a second device too
    moves_itself: bool  # rates and SLOs for which the controller moves models and makes replicas
    long_answers: bool  # some last longer than a turn, and than a move waits
    fault_s: float = 60.0


@dataclass
class Watch:
    """Looks at every step and every command, and remembers what must not happen twice."""

    plan: Plan
    granted: dict[tuple[RequestId, int], RuntimeId]
    refused: set[tuple[int, RequestId]]
    lost: set[tuple[int, RequestId, int]]

    def step(self, world: World) -> None:
        controller = world.controller
        controller.check()
        if self.plan.overhead_known and controller._supervisor.known:
            for model in controller._fleet.models.values():
                alone = self.plan.moves_itself or len(model.serving) <= 1
                assert alone, "two runtimes serve a model that needs one"
            for device in controller._fleet.devices.values():
                assert world.held_bytes(device.name) <= device.charged_bytes, "held without a promise"
                # One that an earlier router started may sleep; until its Hello it is charged as if it did not.
                unheard = any(r.adopted and not r.known for r in device.residents.values())
                assert device.charged_bytes <= device.budget_bytes or unheard
        live = Counter(key.request for r in world.runtimes.values() for key in r.running)
        assert all(count == 1 for count in live.values()), "a request runs twice"

    def command(self, world: World, command: Command) -> None:
        if isinstance(command, ToApi):
            self._answer(world, command)
        match command.message:
            case StartRuntime(model=model, device=device):
                there = [r for r in world.runtimes.values() if (r.model, r.device) == (model, device)]
                assert not there, "a second runtime of a model on a device"
            case Wake(runtime=runtime):
                assert runtime in command.runtime  # type: ignore[union-attr]

    def _answer(self, world: World, command: ToApi) -> None:
        match command.message:
            case Grant(request=request, attempt=attempt, runtime=runtime):
                assert attempt <= 2
                assert (world.epoch, request) not in self.refused, "granted after it was refused"
                # By this router: another one that dies may take both the grant and its loss with it.
                assert (world.epoch, request, attempt) not in self.lost, "granted after it was lost"
                # A router that dies may take a grant with it; then the next one grants that attempt anew.
                before = self.granted.get((request, attempt))
                assert before in (None, runtime) or world.epoch > _epoch(before)
                self.granted[request, attempt] = runtime
            case Refuse(request=request):
                assert (world.epoch, request) not in self.refused, "refused twice"
                self.refused.add((world.epoch, request))
            case Lost(request=request, attempt=attempt):
                self.lost.add((world.epoch, request, attempt))


def _calm_s(plan: Plan) -> float:
    return 800.0 if plan.long_answers else 400.0


def _epoch(runtime: RuntimeId | None) -> int:
    return 0 if runtime is None else int(runtime.rpartition(".")[2].split("-")[0])


def config_of(plan: Plan) -> Config:
    budget = plan.models_a_device * (WEIGHTS + FLOOR) + plan.num_models * OVERHEAD
    return Config(
        server=ServerConfig(max_queue=30, activation_timeout_s=600.0),
        memory=MemoryConfig(),
        scheduler=SchedulerConfig(
            sleep_after_s=10.0,
            min_residence_s=1.0,
            max_wait_s=5.0,
            window_s=6.0 if plan.moves_itself else 60.0,
            move_drain_s=20.0,
            spares=plan.spares,
        ),
        devices=tuple(
            DeviceConfig(name=f"host{i}", kind="host", memory_bytes=budget) for i in range(plan.num_devices)
        ),
        models={
            f"m{i}": ModelConfig(
                name=f"m{i}",
                path="",
                slo=Slo(ttft_s=1.0, tpot_s=0.021 if plan.moves_itself else 0.1),
                pin=plan.pinned and i == 0 and plan.models_a_device > 1,
                preload=i % 3 != 2,
                priority=i % 2,
                weights_bytes=WEIGHTS + (OVERHEAD if plan.overhead_known else 0),
                min_kv_bytes=FLOOR,
                kv_bytes_per_token=1000,
                context_tokens=2048,
            )
            for i in range(plan.num_models)
        },
    )


def facts_of(plan: Plan) -> dict[str, RuntimeFacts]:
    facts = RuntimeFacts(
        weights_bytes=WEIGHTS,
        overhead_bytes=OVERHEAD,
        kv_bytes_per_token=1000,
        max_request_tokens=2048,
        floor_bytes=FLOOR,
        ceiling_bytes=FLOOR * 2,
        max_running_requests=2,
        block_tokens=1,
    )
    return {f"m{i}": facts for i in range(plan.num_models)}


def run_plan(plan: Plan) -> World:
    """Faults for ``fault_s``, then calm until nothing is left to do; checks as it goes."""
    random = Random(plan.seed)
    watch = Watch(plan, {}, set(), set())
    calm = False

    def fails(share: float, wanted: bool, reason: str) -> str | None:
        return reason if wanted and not calm and random.random() < share else None

    costs = Costs(
        start_s=0.5 if plan.moves_itself else 5.0,
        delay_s=lambda link, number: 0.0002 if calm else random.uniform(0.0001, plan.slowest_s),
        copies=lambda link, number: 2 if not calm and random.random() < plan.share_doubled else 1,
        survive=lambda link, first, end: random.randint(first, end),
    )
    world = World(
        config_of(plan),
        facts_of(plan),
        costs,
        apis=APIS,
        load_fails=lambda runtime: fails(0.3, plan.loads_fail, "out of luck"),
        wake_fails=lambda runtime: fails(0.2, plan.wakes_fail, "the copy failed"),
        on_step=watch.step,
        on_command=watch.command,
    )
    _schedule(plan, world, random)
    world.run(plan.fault_s)
    calm = True
    world.run(plan.fault_s + _calm_s(plan))
    _check_end(plan, world)
    return world


def _schedule(plan: Plan, world: World, random: Random) -> None:
    def kill() -> None:
        if world.runtimes:
            world.kill(random.choice(list(world.runtimes)))

    for _ in range(plan.num_kills):
        world.after(random.uniform(0, plan.fault_s), kill)
    for _ in range(plan.num_router_restarts):
        world.after(random.uniform(0, plan.fault_s), world.restart_router)

    def move() -> None:
        model, device = f"m{random.randrange(plan.num_models)}", f"host{random.randrange(plan.num_devices)}"
        ask = AskAdmin(ask=f"a{world.now}", verb="move", model=model, device=device)
        world.from_api(random.choice(APIS), ask)

    def kill_mover() -> None:
        count = Counter(r.model for r in world.runtimes.values())
        if moving := [i for i, r in world.runtimes.items() if count[r.model] > 1]:
            world.kill(random.choice(moving))

    for _ in range(plan.num_moves):
        world.after(random.uniform(0, plan.fault_s), move)
    for _ in range(plan.kills_of_movers):
        world.after(random.uniform(0, plan.fault_s), kill_mover)
    for number in range(plan.num_requests):
        api = world.apis[random.choice(APIS)]
        model = f"m{random.randrange(plan.num_models)}"
        tokens = (random.randrange(1, 500), random.randrange(1, 60))
        if plan.long_answers and random.random() < 0.3:
            tokens = (tokens[0], random.randrange(400, 1200))  # longer than a turn
        at, priority = random.uniform(0, plan.fault_s), random.choice((0, 0, 0, 1))
        request = RequestId(f"r{number}")
        world.after(at, lambda a=api, r=request, m=model, t=tokens, p=priority: a.request(r, m, *t, p))  # type: ignore[misc]
        if random.random() < plan.share_abandoned:
            world.after(at + random.expovariate(0.5), lambda a=api, r=request: a.abandon(r))  # type: ignore[misc]


def _check_end(plan: Plan, world: World) -> None:
    clients = [client for api in world.apis.values() for client in api.clients.values()]
    assert len(clients) == plan.num_requests
    completed = Counter(world.completed)
    for client in clients:
        assert len(client.ends) == 1, f"{client.id} has ends {client.ends}"
        end = client.ends[0]
        # A runtime may die with a whole answer on its way; then there is a second attempt, never a third.
        assert (1 if end == "ok" else 0) <= completed[client.id] <= client.attempt
        if end == "refused":
            assert client.refusal is not None
            assert client.refusal.code in ("model_failed", "queue_full", "no_room")
        if end == "error":
            cut_off = plan.long_answers and (plan.num_moves or plan.moves_itself or plan.num_router_restarts)
            faults = plan.num_kills or plan.kills_of_movers or plan.wakes_fail or cut_off
            assert faults, "an error needs a fault"
        assert client.ended_at is not None
        assert client.ended_at < plan.fault_s + _calm_s(plan) / 2, f"{client.id} of {client.model} starved"
    assert len(world.controller._table) == 0
    for model in world.controller.status(world.now).models:
        assert model.queued == 0
        assert model.in_flight == 0
    for model in world.controller._fleet.models.values():
        others = [(runtime.role.value, runtime.state.value) for runtime in model.others]
        assert others == [] or (plan.spares and others == [("spare", "asleep")]), (
            "a move has left a second runtime"
        )
    alive = {runtime.id for model in world.controller._fleet.models.values() for runtime in model.runtimes}
    assert set(world.runtimes) <= alive, "a process that the router does not know"


if __name__ == "__main__":  # a fixed plan's trace, to be compared between processes of different hash seeds
    world = run_plan(
        Plan(
            int(sys.argv[1]),
            5,
            2,
            1,
            40,
            4,
            2,
            0.2,
            0.2,
            0.2,
            True,
            True,
            True,
            False,
            8,
            2,
            True,
            True,
            True,
        )
    )
    print(world.log.hexdigest())
