"""What the Controller costs: time an event at 10, 100 and 1,000 models, a placement, memory over many requests.

``python -m benchmarks.controller`` writes benchmarks/results/controller.json; about four minutes of one core.
``python -m benchmarks.controller --memory 10000000`` writes controller_memory.json: three minutes a million requests.

The real Controller; its peers only answer, in virtual time and in the order in which real ones do: engines beat once a
second, start, sleep and wake when told to, answer 0.05 s after a grant and are done a second later. Models are 1B to
8B, up to 1,000 on 256 devices of 36 GiB, which not all can be awake on; their popularity is Zipf's. Only the
CPU time of ``Controller.handle`` and ``next_tick`` counts, garbage collection in it included: what other processes take
of the machine meanwhile is not the Controller's.
"""

from __future__ import annotations

import argparse
import bisect
import cProfile
import datetime
import gc
import heapq
import itertools
import json
import math
import os
import platform
import pstats
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from prism_sgl.config import Config, DeviceConfig, MemoryConfig, ModelConfig, SchedulerConfig, ServerConfig
from prism_sgl.messages import (
    ApiBeat,
    ApiHello,
    Finished,
    FirstToken,
    Grant,
    Hello,
    Introduce,
    Load,
    RequestId,
    RuntimeExited,
    RuntimeFacts,
    RuntimeId,
    RuntimeState,
    Sleep,
    Slept,
    Started,
    StartRuntime,
    StopRuntime,
    Submit,
    SupervisorHello,
    Wake,
    Woke,
)
from prism_sgl.schedulers import placement
from prism_sgl.schedulers.balance import rebalance
from prism_sgl.schedulers.controller import (
    Command,
    Controller,
    Event,
    FromApi,
    FromRuntime,
    FromSupervisor,
    Tick,
    ToApi,
)
from prism_sgl.schedulers.placement import Demand, Place
from prism_sgl.schedulers.sides import Serving

RESULTS = Path(__file__).parent / "results"
SIZES = ((10, 3), (100, 26), (1000, 256))  # models, devices
GIB, MIB = 1 << 30, 1 << 20
REQUESTS_PER_S_AND_DEVICE = 4.0
MEMORY_SIZE = (10, 3)  # what grows with requests grows here too, and they cost least
_API = "api0"
# Weights and KV bytes a token of Llama 3's 8B, 3B and 1B.
_SIZES = ((14.96, 131072), (5.98, 114688), (2.30, 32768), (2.30, 32768))


def config(num_models: int, num_devices: int) -> Config:
    return Config(
        server=ServerConfig(max_queue=10**9),
        memory=MemoryConfig(kv_page_bytes=64 * MIB, weights_page_bytes=64 * MIB),
        scheduler=SchedulerConfig(start_parallel=num_models),
        devices=tuple(
            DeviceConfig(name=f"gpu{i}", kind="cuda", index=i, memory_bytes=36 * GIB)
            for i in range(num_devices)
        ),
        models={f"m{i}": _model(i) for i in range(num_models)},
    )


def _model(number: int) -> ModelConfig:
    weights_gib, kv_bytes = _SIZES[number % len(_SIZES)]
    return ModelConfig(
        name=f"m{number}",
        path="",
        weights_bytes=int(weights_gib * GIB),
        kv_bytes_per_token=kv_bytes,
        context_tokens=4096,
        min_kv_bytes=4096 * kv_bytes,
    )


class Drive:
    """Owner of the virtual time and of the Controller's peers. ``times_us``: by event, if they are kept."""

    def __init__(self, num_models: int, num_devices: int, *, keep_times: bool = True) -> None:
        self.config = config(num_models, num_devices)
        self.controller = Controller(self.config, epoch=1)
        self.now = 0.0
        self.num_events = self.num_answered = 0
        self.times_us: dict[str, list[float]] | None = defaultdict(list) if keep_times else None
        self.seconds = 0.0
        self._noise = random.Random(1)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._runtimes: dict[RuntimeId, RuntimeState] = {}
        self._models: dict[RuntimeId, tuple[str, str]] = {}
        self._in_flight: dict[RuntimeId, int] = defaultdict(int)
        self._names = list(self.config.models)
        self._popularity = list(itertools.accumulate(1 / rank for rank in range(1, num_models + 1)))
        self._every_s = 1 / (REQUESTS_PER_S_AND_DEVICE * num_devices)
        self._tick_at = math.inf

    # ------------------------------------------------------------ time

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + seconds, next(self._number), action))

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            if self._tick_at <= self._heap[0][0]:
                self.now, self._tick_at = max(self.now, self._tick_at), math.inf
                self.handle("tick", Tick())
                continue
            self.now, _, action = heapq.heappop(self._heap)
            action()

    def handle(self, kind: str, event: Event) -> None:
        began_ns = time.thread_time_ns()
        commands = self.controller.handle(event, self.now)
        wait_s = self.controller.next_tick(self.now)
        took_ns = time.thread_time_ns() - began_ns
        self.num_events += 1
        self.seconds += took_ns / 1e9
        if self.times_us is not None:
            self.times_us[kind].append(took_ns / 1000)
        # A millisecond is the least that the router's timer waits.
        self._tick_at = math.inf if wait_s is None else self.now + max(wait_s, 0.001)
        for command in commands:
            self._obey(command)

    # ------------------------------------------------------------ peers

    def start(self) -> None:
        """Until every model has been up; then the beats and the requests begin."""
        self.handle("supervisor", FromSupervisor(SupervisorHello()))
        self.handle("api hello", FromApi(_API, ApiHello(api=_API)))
        self.after(1.0, self._api_beat)
        began = self.now
        self.run(lambda: self.now > began + 120.0)
        self.after(0.0, self._arrive)
        self.run(lambda: self.now > began + 180.0)  # until the beats' and requests' rhythm is its own

    def _obey(self, command: Command) -> None:
        match command.message:
            case Grant(request=request, attempt=attempt, runtime=runtime):
                self._take(runtime, request, attempt)
            case StartRuntime(runtime=runtime, model=model, device=device):
                self._models[runtime] = (model, device)
                self.after(10.0, lambda: self._up(runtime))
            case StopRuntime(runtime=runtime):
                self._runtimes.pop(runtime, None)
                exited = RuntimeExited(runtime=runtime, reason="stopped", expected=True)
                self.after(0.5, lambda: self.handle("supervisor", FromSupervisor(exited)))
            case Sleep(runtime=runtime):
                self._runtimes[runtime] = RuntimeState.ASLEEP
                self._say_after(0.03, "slept", Slept(runtime=runtime, seconds=0.03))
            case Wake(runtime=runtime):
                self._runtimes[runtime] = RuntimeState.WAKING
                self.after(0.3, lambda: self._awake(runtime))
            case Introduce() if isinstance(command, ToApi):
                self.after(0.0, lambda: self.handle("api hello", FromApi(_API, ApiHello(api=_API))))
            case _:
                pass

    def _say_after(self, seconds: float, kind: str, message: Any) -> None:
        self.after(seconds, lambda: self.handle(kind, FromRuntime(message)))

    def _up(self, runtime: RuntimeId) -> None:
        model, device = self._models[runtime]
        given = self.config.models[model]
        self._runtimes[runtime] = RuntimeState.AWAKE
        facts = RuntimeFacts(
            weights_bytes=given.weights_bytes,
            overhead_bytes=2559 * MIB,
            awake_overhead_bytes=(2559 - 922) * MIB,
            kv_bytes_per_token=given.kv_bytes_per_token,
            max_request_tokens=given.context_tokens,
            floor_bytes=given.min_kv_bytes,
            ceiling_bytes=36 * GIB,
            max_running_requests=256,
            block_tokens=1,
        )
        hello = Hello(runtime=runtime, model=model, device=device, state=RuntimeState.AWAKE, facts=facts)
        self.handle("hello", FromRuntime(hello))
        self.after(self._noise.random(), lambda: self._beat(runtime))

    def _awake(self, runtime: RuntimeId) -> None:
        self._runtimes[runtime] = RuntimeState.AWAKE
        self.handle("woke", FromRuntime(Woke(runtime=runtime, seconds=0.3)))

    def _beat(self, runtime: RuntimeId) -> None:
        if (state := self._runtimes.get(runtime)) is None:
            return
        model, _ = self._models[runtime]
        awake = state is RuntimeState.AWAKE
        load = Load(
            runtime=runtime,
            state=state,
            weights_bytes=self.config.models[model].weights_bytes if awake else 0,
            kv_bytes=self.config.models[model].min_kv_bytes if awake else 0,
            wanted_bytes=0,
            in_flight=self._in_flight[runtime],
        )
        self.handle("load", FromRuntime(load))
        self.after(1.0, lambda: self._beat(runtime))

    def _api_beat(self) -> None:
        self.handle("api beat", FromApi(_API, ApiBeat(api=_API)))
        self.after(1.0, self._api_beat)

    # ------------------------------------------------------------ requests

    def _arrive(self) -> None:
        place = bisect.bisect(self._popularity, self._noise.random() * self._popularity[-1])
        submit = Submit(
            request=RequestId(f"{next(self._number):x}"),
            attempt=1,
            model=self._names[place],
            prompt_tokens=self._noise.randint(8, 400),
            max_new_tokens=256,
            stream=True,
        )
        self.handle("submit", FromApi(_API, submit))
        self.after(self._noise.expovariate(1 / self._every_s), self._arrive)

    def _take(self, runtime: RuntimeId, request: RequestId, attempt: int) -> None:
        self._in_flight[runtime] += 1
        self._say_after(0.0005, "started", Started(runtime=runtime, request=request, attempt=attempt))
        first = FirstToken(runtime=runtime, request=request, attempt=attempt, ttft_s=0.05)
        self._say_after(0.05, "first token", first)
        self.after(1.05, lambda: self._finish(runtime, request, attempt))

    def _finish(self, runtime: RuntimeId, request: RequestId, attempt: int) -> None:
        self._in_flight[runtime] -= 1
        self.num_answered += 1
        finished = Finished(
            runtime=runtime,
            request=request,
            attempt=attempt,
            outcome="ok",
            status=200,
            total_s=1.05,
            prompt_tokens=100,
            completion_tokens=100,
        )
        self.handle("finished", FromRuntime(finished))


# ------------------------------------------------------------ what is measured


def events(num_models: int, num_devices: int, num_events: int, least_s: float = 120.0) -> dict[str, Any]:
    """Times of so many events, and of two minutes at least, so that what comes seldom is in them.

    They are counted once all models have been up and requests have come for a minute.
    """
    drive = Drive(num_models, num_devices)
    drive.start()
    assert drive.times_us is not None
    slowest_start_us = max(itertools.chain.from_iterable(drive.times_us.values()))
    drive.times_us.clear()
    end = drive.num_events + num_events
    began, answered = drive.now, drive.num_answered
    drive.run(lambda: drive.num_events >= end and drive.now >= began + least_s)
    everything = list(itertools.chain.from_iterable(drive.times_us.values()))
    return {
        "models": num_models,
        "devices": num_devices,
        "events": len(everything),
        "requests_per_s": round((drive.num_answered - answered) / (drive.now - began), 1),
        "virtual_seconds": round(drive.now - began, 1),
        "median_us": _rounded(statistics.median(everything)),
        "mean_us": _rounded(statistics.fmean(everything)),
        "p99_us": _rounded(_percentile(everything, 99)),
        "slowest_ms": _rounded(max(everything) / 1000),
        "slowest_of_start_ms": _rounded(slowest_start_us / 1000),
        "core_share": _rounded(sum(everything) / 1e6 / (drive.now - began)),
        "by_event": {
            kind: {
                "count": len(times),
                "median_us": _rounded(statistics.median(times)),
                "p99_us": _rounded(_percentile(times, 99)),
                "slowest_ms": _rounded(max(times) / 1000),
            }
            for kind, times in sorted(drive.times_us.items())
        },
    }


def placements(num_models: int, num_devices: int) -> dict[str, Any]:
    """``placement.plan``: all models anew on empty devices, five times."""
    noise = random.Random(2)
    names = tuple(f"gpu{i}" for i in range(num_devices))
    demands = []
    for i in range(num_models):
        weights_gib, kv_bytes = _SIZES[i % len(_SIZES)]
        weights_bytes = int(weights_gib * GIB)
        rate = noise.expovariate(1 / 500)
        needed = weights_bytes + 4096 * kv_bytes + 2559 * MIB
        demands.append(Demand(f"m{i}", weights_bytes, needed, placement.pressure(rate, kv_bytes, 0.1), names))
    places = [Place(name, 74 * GIB, 74 * GIB) for name in names]
    times_s = []
    for _ in range(5):
        began_ns = time.thread_time_ns()
        placement.plan(demands, places)
        times_s.append((time.thread_time_ns() - began_ns) / 1e9)
    return {"models": num_models, "devices": num_devices, "median_s": _rounded(statistics.median(times_s))}


def balance_pass(num_models: int, num_devices: int) -> dict[str, Any]:
    """``balance.rebalance`` where it finds nothing and so looks at everything: all devices equally busy, five times."""
    noise = random.Random(7)
    names = tuple(f"gpu{i}" for i in range(num_devices))
    servings, taken = [], dict.fromkeys(names, 0)
    for i in range(num_models):
        device = names[i % num_devices]
        demand = Demand(f"m{i}", 4 * GIB, 6 * GIB, noise.expovariate(1.0) * 1e7, names, 0.22)
        servings.append(Serving(demand, device))
        taken[device] += demand.needed_bytes
    places = [Place(name, 72 * GIB, max(0, 72 * GIB - taken[name])) for name in names]
    times_s = []
    for _ in range(5):
        began_ns = time.thread_time_ns()
        rebalance(servings, places, 0.1, gain=0.1, most_steps=2)
        times_s.append((time.thread_time_ns() - began_ns) / 1e9)
    return {"models": num_models, "devices": num_devices, "median_s": _rounded(statistics.median(times_s))}


def memory(num_requests: int) -> dict[str, Any]:
    """Resident memory and live objects of this process at ten points of so many requests."""
    drive = Drive(*MEMORY_SIZE, keep_times=False)
    drive.start()
    points = []
    process = psutil.Process()
    for tenth in range(11):
        end = drive.num_answered + (num_requests // 10 if tenth else 0)
        drive.run(lambda end=end: drive.num_answered >= end)  # type: ignore[misc]
        gc.collect()
        row = {"requests": tenth * (num_requests // 10), "rss_mib": round(process.memory_info().rss / MIB, 2)}
        points.append(row | {"objects": len(gc.get_objects())})
        print(f"  {points[-1]}", flush=True)
    later = points[5:]
    per_million = 1e6 / (later[-1]["requests"] - later[0]["requests"])
    return {
        "models": MEMORY_SIZE[0],
        "devices": MEMORY_SIZE[1],
        "requests": num_requests,
        "points": points,
        "rss_mib_per_million": _rounded((later[-1]["rss_mib"] - later[0]["rss_mib"]) * per_million),
        "objects_per_million": round((later[-1]["objects"] - later[0]["objects"]) * per_million),
    }


def profile(num_models: int, num_devices: int, num_events: int) -> None:
    """Where the time goes: the twenty functions that take most of their own."""
    drive = Drive(num_models, num_devices, keep_times=False)
    drive.start()
    end = drive.num_events + num_events
    profiler = cProfile.Profile()
    profiler.runcall(drive.run, lambda: drive.num_events >= end)
    stats = pstats.Stats(profiler, stream=sys.stdout)
    stats.sort_stats("tottime").print_stats("prism_sgl", 20)
    stats.sort_stats("cumulative").print_stats("prism_sgl", 20)


def _percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--events", type=int, default=200_000, help="timed at each size")
    parser.add_argument(
        "--memory", type=int, metavar="REQUESTS", help="only look at memory, over so many requests"
    )
    parser.add_argument(
        "--profile", type=int, metavar="MODELS", help="only say where the time goes at this size"
    )
    args = parser.parse_args()
    if args.profile:
        profile(args.profile, max(1, round(args.profile * 256 / 1000)), args.events)
        return
    if args.memory:
        held = memory(args.memory)
        row = ("growth of memory a million requests", held["rss_mib_per_million"], "MiB", "< 1", 1)
        write("controller_memory", [row], memory=held)
        return
    sizes, plans, passes = [], [], []
    for models, devices in SIZES:
        sizes.append(found := events(models, devices, args.events))
        print(f"{models} models: { ({k: v for k, v in found.items() if k != 'by_event'}) }", flush=True)
        plans.append(placements(models, devices))
        passes.append(balance_pass(models, devices))
        print(f"  placement anew {plans[-1]['median_s']} s, a pass {passes[-1]['median_s']} s", flush=True)
    largest = sizes[-1]
    targets = [
        ("median of an event, 1,000 models, 256 devices", largest["median_us"], "us", "< 100", 100),
        ("a placement of all models, 1,000 on 256", plans[-1]["median_s"], "s", "< 1", 1),
        ("a global pass over them that finds nothing", passes[-1]["median_s"], "s", "< 1", 1),
        (
            "slowest event, global passes among them, 1,000 models, 256 devices",
            largest["slowest_ms"],
            "ms",
            "< 1000",
            1000,
        ),
        ("slowest event of a start of 1,000 models", largest["slowest_of_start_ms"], "ms", "< 1000", 1000),
    ]
    write("controller", targets, events=sizes, placements=plans, passes=passes)


def write(name: str, targets: Sequence[tuple[str, float, str, str, float]], **details: Any) -> None:
    """``targets``: what, ours, unit, the target in words, and what ours must be less than."""
    result = {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.controller {' '.join(sys.argv[1:])}".strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}; "
        f"load average {os.getloadavg()[0]:.1f}",
        "rows": [
            {"what": what, "ours": value, "unit": unit, "target": target, "met": value < limit}
            for what, value, unit, target, limit in targets
        ],
        **details,
    }
    for row in result["rows"]:
        print(
            f"{row['what']}: {row['ours']} {row['unit']} ({row['target']}: {'met' if row['met'] else 'MISSED'})"
        )
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
