"""What the Controller costs: a global pass and an event, by number of models. On one core, nothing else asked.

``python -m benchmarks.controller_cost [--json OUT.json]``
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

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
    ApiHello,
    Finished,
    FirstToken,
    Grant,
    Hello,
    RequestId,
    RuntimeFacts,
    RuntimeState,
    Started,
    StartRuntime,
    Submit,
    SupervisorHello,
)
from prism_sgl.schedulers.balance import rebalance
from prism_sgl.schedulers.controller import Controller, FromApi, FromRuntime, FromSupervisor, Tick
from prism_sgl.schedulers.placement import Demand, Place, pack
from prism_sgl.schedulers.sides import Serving

GIB = 1 << 30
SIZES = ((10, 4), (100, 32), (1000, 256))
FACTS = RuntimeFacts(
    weights_bytes=4 * GIB,
    overhead_bytes=GIB,
    kv_bytes_per_token=131072,
    max_request_tokens=8192,
    floor_bytes=GIB,
    ceiling_bytes=60 * GIB,
    max_running_requests=64,
    block_tokens=1,
)


def fleet_of(num_models: int, num_devices: int) -> Config:
    return Config(
        server=ServerConfig(),
        memory=MemoryConfig(),
        scheduler=SchedulerConfig(start_parallel=num_models),
        devices=tuple(
            DeviceConfig(name=f"gpu{i}", kind="cuda", index=i, memory_bytes=72 * GIB)
            for i in range(num_devices)
        ),
        models={
            f"m{i}": ModelConfig(
                name=f"m{i}",
                path="",
                slo=Slo(),
                weights_bytes=4 * GIB,
                kv_bytes_per_token=131072,
                context_tokens=8192,
                min_kv_bytes=GIB,
            )
            for i in range(num_models)
        },
    )


def pass_s(num_models: int, num_devices: int, shape: str, repeats: int = 5) -> float:
    """Median seconds of one pure pass on a random fleet."""
    draw = random.Random(7)
    devices = tuple(f"gpu{i}" for i in range(num_devices))
    servings, taken = [], dict.fromkeys(devices, 0)
    for i in range(num_models):
        device = devices[i % num_devices] if shape == "even" else draw.choice(devices)
        compute = 0.22 if shape == "even" else min(0.9, draw.expovariate(4.0))
        demand = Demand(f"m{i}", 4 * GIB, 6 * GIB, draw.expovariate(1.0) * 1e7, devices, compute)
        servings.append(Serving(demand, device))
        taken[device] += demand.needed_bytes
    places = [Place(name, 72 * GIB, max(0, 72 * GIB - taken[name])) for name in devices]
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        rebalance(servings, places, 1e-1, gain=0.1, most_steps=2)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def pack_s(num_models: int, num_devices: int) -> float:
    draw = random.Random(7)
    devices = tuple(f"gpu{i}" for i in range(num_devices))
    demands = [
        Demand(
            f"m{i}", 4 * GIB, 6 * GIB, draw.expovariate(1.0) * 1e7, devices, min(0.9, draw.expovariate(4.0))
        )
        for i in range(num_models)
    ]
    places = [Place(name, 72 * GIB, 72 * GIB) for name in devices]
    began = time.perf_counter()
    pack(demands, places, 1e-1)
    return time.perf_counter() - began


class _Driven:
    """A Controller with all engines up, and the clients and engines of a stream of requests."""

    def __init__(self, num_models: int, num_devices: int) -> None:
        self.controller = Controller(fleet_of(num_models, num_devices), epoch=1)
        self.now = 1000.0
        self.took: list[float] = []
        self.passes: list[float] = []
        self._do(FromApi("api", ApiHello(api="api")))
        starts = self._do(FromSupervisor(SupervisorHello()))
        for command in starts:
            if isinstance(start := command.message, StartRuntime):
                hello = Hello(
                    runtime=start.runtime,
                    model=start.model,
                    device=start.device,
                    state=RuntimeState.AWAKE,
                    facts=FACTS,
                    start_s=10.0,
                )
                self._do(FromRuntime(hello))

    def _do(self, event: object) -> list[object]:
        due = self.controller._balancer.next_at <= self.now
        began = time.perf_counter()
        commands = self.controller.handle(event, self.now)  # type: ignore[arg-type]
        took = time.perf_counter() - began
        (self.passes if due else self.took).append(took)
        return commands  # type: ignore[return-value]

    def run(self, num_requests: int, num_models: int) -> None:
        draw = random.Random(3)
        self.took.clear()
        self.passes.clear()
        for number in range(num_requests):
            self.now += 0.002
            model = f"m{min(num_models - 1, int(draw.paretovariate(1.0)) - 1)}"
            submit = Submit(
                request=RequestId(f"r{number}"),
                attempt=1,
                model=model,
                prompt_tokens=draw.randrange(10, 500),
                max_new_tokens=200,
                stream=True,
            )
            for command in self._do(FromApi("api", submit)):
                if isinstance(grant := command.message, Grant):  # type: ignore[attr-defined]
                    key = {"runtime": grant.runtime, "request": grant.request, "attempt": grant.attempt}
                    self._do(FromRuntime(Started(**key)))
                    self._do(FromRuntime(FirstToken(**key, ttft_s=0.03)))
                    self._do(
                        FromRuntime(
                            Finished(
                                **key,
                                outcome="ok",
                                status=200,
                                total_s=1.5,
                                prompt_tokens=100,
                                completion_tokens=150,
                            )
                        )
                    )
        self._do(Tick())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for num_models, num_devices in SIZES:
        driven = _Driven(num_models, num_devices)
        driven.run(10_000, num_models)
        row = {
            "models": num_models,
            "devices": num_devices,
            "event_median_us": statistics.median(driven.took) * 1e6,
            "event_p99_us": statistics.quantiles(driven.took, n=100)[98] * 1e6,
            "controller_pass_median_s": statistics.median(driven.passes),
            "controller_pass_max_s": max(driven.passes),
            "pass_random_s": pass_s(num_models, num_devices, "random"),
            "pass_even_s": pass_s(num_models, num_devices, "even"),
            "pack_s": pack_s(num_models, num_devices),
        }
        rows.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
