"""Policy ``prism``: the live Controller, driving engines that compute instead of real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from prism_sgl import config
from prism_sgl.config import Config, DeviceConfig, MemoryConfig, ModelConfig, SchedulerConfig, ServerConfig
from prism_sgl.messages import RuntimeState, Wake
from prism_sgl.schedulers.controller import Command, ToRuntime, ToSupervisor
from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.moves_seen import MovesSeen
from prism_sgl.schedulers.replay.runtime import ReplayRuntime, facts_of, make_runtime
from prism_sgl.schedulers.replay.spanning import part_specs, parts_by_name, place
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, ModelSpec, Outcome, Replayed, span_s
from prism_sgl.schedulers.simulator import Costs, World
from prism_sgl.schedulers.virtual import Client

# No request of a replay is refused because many wait: what is late is counted as late.
_MOST_QUEUED = 10**9
_LONGEST_START_S = 3600.0
_STARTED = (RuntimeState.AWAKE, RuntimeState.ASLEEP)


def controller_config(
    fleet: Fleet, scheduler: SchedulerConfig | None = None, parts: Mapping[str, tuple[int, ...]] | None = None
) -> Config:
    """The models.toml that this fleet would have. All engines start at once: a replay begins when they are up."""
    listed = list(part_specs(fleet.models, parts or {}))
    limits = scheduler or SchedulerConfig(start_parallel=len(listed), spares=fleet.num_devices > 1)
    return Config(
        server=ServerConfig(max_queue=_MOST_QUEUED),
        memory=MemoryConfig(kv_page_bytes=128 << 20, weights_page_bytes=128 << 20),
        scheduler=limits,
        devices=tuple(
            DeviceConfig(name=f"gpu{i}", kind="cuda", index=i, memory_bytes=fleet.device_bytes)
            for i in range(fleet.num_devices)
        ),
        models={spec.name: _model_config(spec, devices, part_of) for spec, devices, part_of in listed},
        file=fleet.name,
    )


def _model_config(spec: ModelSpec, devices: tuple[str, ...], part_of: str) -> ModelConfig:
    return ModelConfig(
        name=spec.name,
        devices=devices,
        path="",
        slo=config.Slo(ttft_s=spec.slo.ttft_s, tpot_s=spec.slo.tpot_s),
        weights_bytes=spec.costs.weights_bytes,
        kv_bytes_per_token=spec.costs.kv_bytes_per_token,
        context_tokens=spec.costs.context_tokens,
        min_kv_bytes=spec.costs.floor_bytes,
        part_of=part_of,
    )


class _Replay:
    """Owner of one world, its devices and its clients."""

    def __init__(self, fleet: Fleet, scheduler: SchedulerConfig | None, *, check: bool) -> None:
        self.fleet = fleet
        parts = place([m for m in fleet.models if m.tp > 1], fleet.num_devices, fleet.device_bytes)
        specs = {spec.name: spec for spec, _, _ in part_specs(fleet.models, parts)}
        facts = {name: facts_of(spec, fleet.device_bytes) for name, spec in specs.items()}
        self.devices: dict[str, Device] = {}
        self.wakes = 0
        self.moves = MovesSeen()
        self.world = World(
            controller_config(fleet, scheduler, parts),
            facts,
            Costs(),
            on_step=self._check if check else lambda world: None,
            on_command=self._count,
            make_runtime=make_runtime(specs, self.devices, facts, lambda model: self.parts.get(model)),
        )
        for i in range(fleet.num_devices):
            device = Device(f"gpu{i}", fleet.device_bytes, self.world, fleet.copy_slowdown)
            self.devices[device.name] = device
        self.parts = parts_by_name(fleet.models, parts, list(self.devices.values()), self.world)
        self._served = specs.keys()
        self.requests: list[Client | None] = []  # None: no devices have room for its model

    def _check(self, world: World) -> None:
        world.controller.check()
        for device in self.devices.values():
            device.check()
        for runtime in world.runtimes.values():
            if isinstance(runtime, ReplayRuntime):
                runtime.check()

    def _count(self, world: World, command: Command) -> None:
        if isinstance(command, ToRuntime) and isinstance(command.message, Wake):
            self.wakes += 1
        elif isinstance(command, ToSupervisor):
            self.moves.saw(command.message, world.now)

    def start_all(self) -> None:
        """Until all engines are awake or asleep.

        Before its first Hello the Controller takes an engine for smaller than it is, so devices are larger meanwhile:
        how engines start is not what is replayed, and baselines begin with theirs started too.
        """
        for device in self.devices.values():
            device.resize(2 * device.budget_bytes)
        while self.world.now < _LONGEST_START_S:
            self.world.run(self.world.now + 5.0)
            models = self.world.controller.status(self.world.now).models
            states = [state for m in models for state in (m.state, *(other.state for other in m.others))]
            if all(state in _STARTED for state in states):
                break
        for device in self.devices.values():
            device.resize(device.budget_bytes // 2)

    def request(self, number: int, arrival: Arrival) -> None:
        api = self.world.apis["api0"]
        client = None
        if arrival.model in self._served:
            client = api.request(f"r{number}", arrival.model, arrival.prompt_tokens, arrival.output_tokens)
        self.requests.append(client)

    def is_over(self) -> bool:
        return all(client is None or client.over for client in self.requests)


def _outcome(client: Client | None, arrival: Arrival, began_s: float) -> Outcome:
    """In the trace's time."""
    outcome = Outcome(arrival.model, arrival.at_s, arrival.prompt_tokens, arrival.output_tokens)
    if client is None:
        outcome.failure = "no devices have room for its model"
        return outcome
    if client.first_at is not None:
        outcome.first_at = client.first_at - began_s
    if client.ended_at is not None and client.ends == ["ok"]:
        outcome.ended_at = client.ended_at - began_s
    else:
        outcome.failure = client.ends[0] if client.ends else "not answered in time"
    return outcome


def replay_prism(
    fleet: Fleet,
    arrivals: Sequence[Arrival],
    *,
    drain_s: float = 300.0,
    scheduler: SchedulerConfig | None = None,
    check: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Replayed:
    """The trace begins when all engines are up, and ends ``drain_s`` after its last arrival."""
    replay = _Replay(fleet, scheduler, check=check)
    world = replay.world
    replay.start_all()
    replay.wakes, began_s = 0, world.now
    busy_before = [device.busy_s() for device in replay.devices.values()]
    for number, arrival in enumerate(arrivals):
        world.run(began_s + arrival.at_s)
        replay.request(number, arrival)
        progress(1)
    end_s = began_s + (arrivals[-1].at_s if arrivals else 0.0)
    busy = [d.busy_s() - b for d, b in zip(replay.devices.values(), busy_before, strict=True)]
    while world.now < end_s + drain_s and not replay.is_over():
        world.run(min(world.now + 5.0, end_s + drain_s))
    seconds = max(span_s(arrivals), 1e-9)
    placement: dict[str, list[str]] = {name: [] for name in replay.devices}
    for model in world.controller.status(world.now).models:
        if model.device is not None and model.state is RuntimeState.AWAKE:
            placement[model.device].append(model.name)
    return Replayed(
        outcomes=[
            _outcome(client, arrival, began_s)
            for client, arrival in zip(replay.requests, arrivals, strict=True)
        ],
        moves=[
            move for move in replay.moves.since(began_s) if move.ended_at < math.inf
        ],  # replicas do not end
        migrations=sum(model.moves for model in world.controller.status(world.now).models),
        wakes=replay.wakes,
        gpu_busy=min(1.0, math.fsum(busy) / (seconds * fleet.num_devices)),
        log=world.log.hexdigest(),
        placement=placement,
    )
