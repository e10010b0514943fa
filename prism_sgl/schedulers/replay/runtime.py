"""A runtime of the simulator that computes: the Controller's messages on one side, an Engine on the other.

The Controller cannot tell it from a live one: it says Hello, Load, Started, FirstToken, Finished, Slept, Woke, and
a wake that finds no memory in time is a WakeFailed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from prism_sgl.messages import (
    AskHello,
    Finished,
    FirstToken,
    Hello,
    Load,
    RequestKey,
    RuntimeFacts,
    RuntimeId,
    RuntimeState,
    RuntimeToRouter,
    Sleep,
    SleepRefused,
    Slept,
    Started,
    Wake,
    WakeFailed,
    Woke,
)
from prism_sgl.schedulers.replay.batch import Job
from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.engine import Engine
from prism_sgl.schedulers.replay.spec import ModelCosts, ModelSpec
from prism_sgl.schedulers.simulator import World
from prism_sgl.schedulers.virtual import VirtualApi

# A wake whose memory does not come answers after this (engine/sleep_wake.py waits as long for a reclaim).
_SHORTAGE_S = 2.0


def facts_of(spec: ModelSpec, budget_bytes: int) -> RuntimeFacts:
    """What this model's engine would say of itself in its Hello."""
    costs = spec.costs
    return RuntimeFacts(
        weights_bytes=costs.weights_bytes,
        overhead_bytes=costs.overhead_bytes,
        awake_overhead_bytes=costs.overhead_bytes - costs.asleep_bytes,
        kv_bytes_per_token=costs.kv_bytes_per_token,
        max_request_tokens=costs.context_tokens,
        floor_bytes=costs.floor_bytes,
        ceiling_bytes=budget_bytes,
        max_running_requests=costs.max_running,
        block_tokens=1,
    )


class Computes(Protocol):
    """What a runtime needs of its engine, or of its part of one over several devices."""

    @property
    def owner(self) -> object: ...
    @property
    def open_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def wanted_bytes(self) -> int: ...
    def open(self) -> None: ...
    def close(self, keep_bytes: int) -> None: ...
    def abort(self) -> None: ...
    def set_aside(self) -> list[Job]:
        """All requests, taken out; none if it keeps them itself."""
        ...

    def submit(self, job: Job) -> None: ...
    def cancel(self, job: Job) -> None: ...
    def check(self) -> None: ...


class ReplayRuntime:
    """One engine behind the Controller's messages: takes its commands one after the other."""

    def __init__(
        self,
        runtime: RuntimeId,
        spec: ModelSpec,
        device: Device,
        world: World,
        facts: RuntimeFacts,
        engine: Computes | None = None,
    ) -> None:
        self.id, self.model, self.device = runtime, spec.name, device.name
        self._costs: ModelCosts = spec.costs
        self._world, self._device, self._facts = world, device, facts
        self._engine: Computes = engine or Engine(runtime, spec.costs, (device,), world)
        self._state = RuntimeState.STARTING
        self.connected = False
        self._alive = True
        self._commands: deque[object] = deque()
        self._obeying = False
        self._keep = False  # its weights, at the sleep at hand
        self._num_wakes = 0
        self._seen: set[RequestKey] = set()
        self._jobs: dict[RequestKey, Job] = {}
        self._aside: list[Job] = []  # they wait for the wake

    @property
    def held_bytes(self) -> int:
        return self._device.held_by(self._engine.owner)

    # ------------------------------------------------------------ life

    def start(self) -> None:
        self._after(self._costs.start_s, self._load)

    def _load(self) -> None:
        if not self._device.try_hold(self._engine.owner, self._engine.open_bytes):
            self._world.kill(self.id, "no memory")
            return
        self._engine.open()
        self._state, self.connected = RuntimeState.AWAKE, True
        self._say_hello()
        self._beat()

    def die(self) -> None:
        self._alive = self.connected = False
        self._device.drop_claim(self._engine.owner)
        self._device.lose_kept(self._engine.owner)
        self._jobs.clear()
        self._aside.clear()
        self._engine.abort()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._world.after(seconds, lambda: action() if self._alive else None)

    def _say(self, message: RuntimeToRouter) -> None:
        self._world.from_runtime(self.id, message)

    def _say_hello(self) -> None:
        hello = Hello(
            runtime=self.id,
            model=self.model,
            device=self.device,
            state=self._state,
            facts=self._facts,
            running=list(self._jobs),
            start_s=self._costs.start_s,
        )
        self._say(hello)

    def _beat(self) -> None:
        awake = self._state is RuntimeState.AWAKE
        self._say(
            Load(
                runtime=self.id,
                state=self._state,
                weights_bytes=self._costs.weights_bytes
                if awake
                else self._device.kept_by(self._engine.owner),
                kv_bytes=self._engine.kv_bytes,
                wanted_bytes=self._engine.wanted_bytes if awake else 0,
                in_flight=len(self._jobs),
            )
        )
        self._after(self._world.costs.beat_s, self._beat)

    # ------------------------------------------------------------ commands of the router

    def receive(self, message: object) -> None:
        self._commands.append(message)
        self._obey()

    def _obey(self) -> None:
        while self._commands and not self._obeying and self._alive:
            match self._commands.popleft():
                case AskHello():
                    self._say_hello()
                case Sleep(preempt=False) if self._jobs and self._state is not RuntimeState.ASLEEP:
                    self._say(SleepRefused(runtime=self.id, reason="requests are being answered"))
                case Sleep() if self._state is RuntimeState.ASLEEP:
                    self._say(Slept(runtime=self.id, seconds=0.0))
                case Sleep(keep_weights=keep, preempt=preempt):
                    self._obeying, self._keep = True, keep
                    self._after(self._costs.sleep_s, partial(self._slept, preempt))
                case Wake() if self._state is RuntimeState.AWAKE:
                    self._say(Woke(runtime=self.id, seconds=0.0))
                case Wake():
                    self._obeying = True
                    self._wake()

    def _slept(self, preempt: bool) -> None:
        self._obeying = False
        if self._jobs and not preempt:
            self._say(SleepRefused(runtime=self.id, reason="a request came in"))
        else:
            self._aside += self._engine.set_aside()
            self._state = RuntimeState.ASLEEP
            self._engine.close(self._costs.asleep_bytes)
            if self._keep:
                self._device.keep(self._engine.owner, self._costs.weights_bytes)
            self._say(Slept(runtime=self.id, seconds=self._costs.sleep_s))
        self._obey()

    def _wake(self) -> None:
        self._state = RuntimeState.WAKING
        self._num_wakes += 1
        number = self._num_wakes
        missing = self._engine.open_bytes - self.held_bytes
        self._device.claim(self._engine.owner, missing, self._copy)
        self._after(_SHORTAGE_S, lambda: self._give_up(number))

    def _give_up(self, number: int) -> None:
        if self._num_wakes == number and self._device.drop_claim(self._engine.owner):
            self._state, self._obeying = RuntimeState.ASLEEP, False
            self._say(WakeFailed(runtime=self.id, reason="memory did not come"))
            self._obey()

    def _copy(self, kept_bytes: int) -> None:
        """Only what neighbours have taken: 0.10 s for an 8B that lost 30 %, 0.32 s for all (wake.json)."""
        lost = 1 - kept_bytes / self._costs.weights_bytes
        seconds = max(self._costs.wake_in_place_s, self._costs.wake_s * lost)
        self._device.copying(1)
        # Not _after: the link is free again though the process may have died meanwhile.
        self._world.after(seconds, lambda: self._woke(seconds))

    def _woke(self, seconds: float) -> None:
        self._device.copying(-1)
        if not self._alive:
            return
        self._obeying, self._state = False, RuntimeState.AWAKE
        self._engine.open()
        aside, self._aside = self._aside, []
        for job in aside:
            self._engine.submit(job)
        self._say(Woke(runtime=self.id, seconds=seconds))
        self._obey()

    # ------------------------------------------------------------ requests of an api_server

    def forward(self, api: VirtualApi, key: RequestKey, prompt_tokens: int, new_tokens: int) -> None:
        if key in self._seen:
            return  # deduplicated on (id, attempt)
        self._seen.add(key)
        if self._state is not RuntimeState.AWAKE:
            self._world.answered(api, self.id, key.request, key.attempt, "broke")
            return
        self._say(Started(runtime=self.id, request=key.request, attempt=key.attempt))
        taken_at = self._world.now

        def first() -> None:
            ttft_s = self._world.now - taken_at
            token = FirstToken(runtime=self.id, request=key.request, attempt=key.attempt, ttft_s=ttft_s)
            self._say(token)
            self._world.answered(api, self.id, key.request, key.attempt, "first")

        def end() -> None:
            self._world.completed.append(key.request)
            self._world.answered(api, self.id, key.request, key.attempt, "last")
            self._over(key, "ok", taken_at, prompt_tokens, new_tokens)

        job = self._jobs[key] = Job(key, prompt_tokens, new_tokens, first, end)
        # Tokenizer and HTTP: side by side, before the engine sees the request.
        self._after(self._costs.latency_s, lambda: self._submit(key, job))

    def _submit(self, key: RequestKey, job: Job) -> None:
        if key not in self._jobs:
            return
        if self._state is not RuntimeState.AWAKE:
            self._aside.append(job)
        else:
            self._engine.submit(job)

    def cancel(self, key: RequestKey) -> None:
        self._seen.add(key)
        if (job := self._jobs.get(key)) is not None:
            if job in self._aside:
                self._aside.remove(job)
            else:
                self._engine.cancel(job)
            self._over(key, "cancelled", self._world.now, job.prompt_tokens, job.written)

    def _over(self, key: RequestKey, outcome: str, began: float, prompt: int, written: int) -> None:
        del self._jobs[key]
        finished = Finished(
            runtime=self.id,
            request=key.request,
            attempt=key.attempt,
            outcome=outcome,
            status=200,
            total_s=self._world.now - began,
            prompt_tokens=prompt,
            completion_tokens=written,
        )
        self._say(finished)

    def check(self) -> None:
        self._engine.check()


def make_runtime(
    specs: Mapping[str, ModelSpec],
    devices: Mapping[str, Device],
    facts: Mapping[str, RuntimeFacts],
    part: Callable[[str], Computes | None],
) -> Callable[[RuntimeId, str, str, World], ReplayRuntime]:
    """For ``World(make_runtime=...)``."""

    def make(runtime: RuntimeId, model: str, device: str, world: World) -> ReplayRuntime:
        return ReplayRuntime(runtime, specs[model], devices[device], world, facts[model], part(model))

    return make
