"""Policy ``prism``: the live Controller, driving engines that compute instead of real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from prism_sgl import config
from prism_sgl.config import Config, DeviceConfig, MemoryConfig, ModelConfig, SchedulerConfig, ServerConfig
from prism_sgl.messages import RuntimeState, Wake
from prism_sgl.schedulers.controller import Command, ToRuntime
from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.runtime import ReplayRuntime, facts_of, make_runtime
from prism_sgl.schedulers.replay.spanning import Spanning, place
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, ModelSpec, Outcome, Replayed, span_s
from prism_sgl.schedulers.simulator import Costs, World
from prism_sgl.schedulers.virtual import Client

# No request of a replay is refused because many wait: what is late is counted as late.
_MOST_QUEUED = 10**9
_LONGEST_START_S = 3600.0


def controller_config(
    fleet: Fleet, scheduler: SchedulerConfig | None = None, parts: Mapping[str, tuple[int, ...]] | None = None
) -> Config:
    """The models.toml that this fleet would have. All engines start at once: a replay begins when they are up."""
    limits = scheduler or SchedulerConfig(start_parallel=len(fleet.models))
    specs, taken = fleet.by_name(), [0] * fleet.num_devices
    for model, devices in (parts or {}).items():
        for i in devices:
            taken[i] += specs[model].costs.awake_bytes
    return Config(
        server=ServerConfig(max_queue=_MOST_QUEUED),
        memory=MemoryConfig(kv_page_bytes=64 << 20, weights_page_bytes=64 << 20),
        scheduler=limits,
        devices=tuple(
            DeviceConfig(name=f"gpu{i}", kind="cuda", index=i, memory_bytes=fleet.device_bytes - taken[i])
            for i in range(fleet.num_devices)
        ),
        models={spec.name: _model_config(spec) for spec in fleet.models if spec.tp == 1},
        file=fleet.name,
    )


def _model_config(spec: ModelSpec) -> ModelConfig:
    return ModelConfig(
        name=spec.name,
        path="",
        slo=config.Slo(ttft_s=spec.slo.ttft_s, tpot_s=spec.slo.tpot_s),
        weights_bytes=spec.costs.weights_bytes,
        kv_bytes_per_token=spec.costs.kv_bytes_per_token,
        context_tokens=spec.costs.context_tokens,
        min_kv_bytes=spec.costs.floor_bytes,
    )


class _Replay:
    """Owner of one world, its devices and its clients."""

    def __init__(self, fleet: Fleet, scheduler: SchedulerConfig | None, *, check: bool) -> None:
        self.specs = specs = fleet.by_name()
        parts = place([m for m in fleet.models if m.tp > 1], fleet.num_devices, fleet.device_bytes)
        facts = {name: facts_of(spec, fleet.device_bytes) for name, spec in specs.items()}
        self.devices: dict[str, Device] = {}
        self.wakes = 0
        self.world = World(
            controller_config(fleet, scheduler, parts),
            facts,
            Costs(),
            on_step=self._check if check else lambda world: None,
            on_command=self._count,
            make_runtime=make_runtime(specs, self.devices, facts),
        )
        for i in range(fleet.num_devices):
            device = Device(f"gpu{i}", fleet.device_bytes, self.world, fleet.copy_slowdown)
            self.devices[device.name] = device
        self.spanning = Spanning(self.world)
        for model, numbers in parts.items():
            self.spanning.add(specs[model], [self.devices[f"gpu{i}"] for i in numbers])
        self.requests: list[Client | Outcome] = []

    def _check(self, world: World) -> None:
        world.controller.check()
        for device in self.devices.values():
            device.check()
        for runtime in world.runtimes.values():
            if isinstance(runtime, ReplayRuntime):
                runtime.check()
        self.spanning.check()

    def _count(self, world: World, command: Command) -> None:
        if isinstance(command, ToRuntime) and isinstance(command.message, Wake):
            self.wakes += 1

    def start_all(self) -> None:
        """Until no engine starts any more and none is about to."""
        busy = (RuntimeState.STARTING, RuntimeState.COLD, RuntimeState.STOPPING, RuntimeState.DRAINING)
        while self.world.now < _LONGEST_START_S:
            self.world.run(self.world.now + 5.0)
            if all(m.state not in busy for m in self.world.controller.status(self.world.now).models):
                return

    def request(self, number: int, arrival: Arrival) -> None:
        spec, api = self.specs[arrival.model], self.world.apis["api0"]
        if spec.tp > 1:
            self.requests.append(self.spanning.request(arrival, spec))
        else:
            self.requests.append(
                api.request(f"r{number}", arrival.model, arrival.prompt_tokens, arrival.output_tokens)
            )

    def is_over(self) -> bool:
        over = all(client.over for client in self.requests if isinstance(client, Client))
        return over and not self.spanning.num_open


def _outcome(request: Client | Outcome, arrival: Arrival, began_s: float) -> Outcome:
    """In the trace's time."""
    outcome = Outcome(arrival.model, arrival.at_s, arrival.prompt_tokens, arrival.output_tokens)
    if request.first_at is not None:
        outcome.first_at = request.first_at - began_s
    if request.ended_at is not None and (isinstance(request, Outcome) or request.ends == ["ok"]):
        outcome.ended_at = request.ended_at - began_s
    elif isinstance(request, Outcome):
        outcome.failure = request.failure or "not answered in time"
    else:
        outcome.failure = request.ends[0] if request.ends else "not answered in time"
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
            _outcome(request, arrival, began_s)
            for request, arrival in zip(replay.requests, arrivals, strict=True)
        ],
        migrations=0,  # the Controller moves a model only where it can be awake nowhere else
        wakes=replay.wakes,
        gpu_busy=min(1.0, math.fsum(busy) / (seconds * fleet.num_devices)),
        log=world.log.hexdigest(),
        placement=placement,
    )
