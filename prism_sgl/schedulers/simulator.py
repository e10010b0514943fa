"""A small deterministic world that drives the Controller: virtual runtimes, api_servers and a supervisor.

The same Controller runs in the router; here a heap of timed actions takes the place of sockets and engines.
Messages of one link stay in order, messages of different links overtake each other, as with ZeroMQ. What costs
how long is data (``Costs``), so that measured numbers can be put in and a trace be replayed. Everything happens
in an order that the inputs alone decide: the same world twice gives the same ``log``.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from prism_sgl.config import Config
from prism_sgl.messages import (
    ApiToRouter,
    RequestId,
    RequestKey,
    RouterToSupervisor,
    RuntimeExited,
    RuntimeFacts,
    RuntimeId,
    RuntimeToRouter,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    SupervisorToRouter,
    encode,
)
from prism_sgl.schedulers.controller import (
    Command,
    Controller,
    Event,
    FromApi,
    FromRuntime,
    FromSupervisor,
    Tick,
    ToApi,
    ToRuntime,
)
from prism_sgl.schedulers.virtual import VirtualApi, VirtualRuntime


class Peer(Protocol):
    """What the world needs of a runtime. ``VirtualRuntime`` costs what it is told; ``replay/runtime.py`` computes."""

    connected: bool

    @property
    def device(self) -> str: ...
    @property
    def held_bytes(self) -> int: ...
    def start(self) -> None: ...
    def die(self) -> None: ...
    def receive(self, message: object) -> None: ...
    def forward(self, api: VirtualApi, key: RequestKey, prompt_tokens: int, new_tokens: int) -> None: ...
    def cancel(self, key: RequestKey) -> None: ...


MakeRuntime = Callable[[RuntimeId, str, str, "World"], Peer]


@dataclass(frozen=True)
class Costs:
    """Seconds. ``delay_s(link, number)`` is how long that link's message of that number travels."""

    start_s: float = 20.0
    sleep_s: float = 0.03
    wake_s: float = 0.3
    prefill_s: float = 0.02
    prefill_s_per_token: float = 1 / 5000
    decode_s_per_token: float = 0.02
    stop_s: float = 0.5
    beat_s: float = 1.0
    delay_s: Callable[[str, int], float] = field(default=lambda link, number: 0.0002)
    copies: Callable[[str, int], int] = field(default=lambda link, number: 1)
    # Of the messages on their way when the router is killed, numbers (first, end): where those that survive begin
    # (to the router: it had read those before, and they die with it) or end (from it: the rest was never sent).
    survive: Callable[[str, int, int], int] = field(
        default=lambda link, first, end: end if link.startswith("router-") else first
    )


class World:
    """Owner of virtual time and of all that happens in it.

    ``load_fails`` and ``wake_fails`` are asked at each start and wake: for a reason the runtime ends.
    """

    def __init__(
        self,
        config: Config,
        facts: dict[str, RuntimeFacts],
        costs: Costs | None = None,
        *,
        apis: Iterable[str] = ("api0",),
        load_fails: Callable[[RuntimeId], str | None] = lambda runtime: None,
        wake_fails: Callable[[RuntimeId], str | None] = lambda runtime: None,
        on_step: Callable[[World], None] = lambda world: None,
        on_command: Callable[[World, Command], None] = lambda world, command: None,
        make_runtime: MakeRuntime = VirtualRuntime,
    ) -> None:
        self.config, self.facts, self.costs = config, facts, costs or Costs()
        self.load_fails, self.wake_fails = load_fails, wake_fails
        self._on_step, self._on_command = on_step, on_command
        self._make_runtime = make_runtime
        self.now = 0.0
        self.log = hashlib.sha256()
        self.num_commands = 0
        self.completed: list[RequestId] = []  # whole answers that runtimes gave
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_actions = 0
        self._link_free_at: dict[str, float] = {}
        self._link_number: dict[str, int] = {}
        self._link_arrived: dict[str, int] = {}
        self._link_lost: dict[str, set[int]] = {}
        self._tick_at: float | None = None
        self.epoch = 1
        self.controller = Controller(config, epoch=self.epoch)
        self.runtimes: dict[RuntimeId, Peer] = {}
        self.apis = {name: VirtualApi(name, self) for name in apis}
        self._from_supervisor(SupervisorHello(alive=[]))
        for api in self.apis.values():
            api.say_hello()
            api.beat()

    # ------------------------------------------------------------ time

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._num_actions += 1
        heapq.heappush(self._heap, (self.now + seconds, self._num_actions, action))

    def run(self, until: float) -> None:
        """Let everything happen that is due until then."""
        while self._heap and self._heap[0][0] <= until:
            at, _, action = heapq.heappop(self._heap)
            self.now = max(self.now, at)
            action()
        self.now = max(self.now, until)

    def send(self, link: str, deliver: Callable[[], None]) -> None:
        """Deliver after the link's delay, never before what was sent on it earlier."""
        number = self._link_number.get(link, 0)
        self._link_number[link] = number + 1
        at = max(self.now + self.costs.delay_s(link, number), self._link_free_at.get(link, 0.0))
        self._link_free_at[link] = at

        def arrive() -> None:
            self._link_arrived[link] = number + 1
            if number not in self._link_lost.get(link, ()):
                deliver()

        for _ in range(self.costs.copies(link, number)):
            self.after(at - self.now, arrive)

    # ------------------------------------------------------------ the router

    def _handle(self, event: Event) -> None:
        commands = self.controller.handle(event, self.now)
        self._on_step(self)
        for command in commands:
            self._carry_out(command)
        wait_s = self.controller.next_tick(self.now)
        # A millisecond is the least that a real timer waits, and keeps rounding from stopping time.
        at = None if wait_s is None else self.now + max(wait_s, 0.001)
        if at is not None and (self._tick_at is None or at < self._tick_at or self._tick_at <= self.now):
            self._tick_at = at
            epoch = self.epoch
            self.after(at - self.now, lambda: self._tick(epoch, at))

    def _tick(self, epoch: int, at: float) -> None:
        if epoch == self.epoch and self._tick_at == at:
            self._tick_at = None
            self._handle(Tick())

    def _carry_out(self, command: Command) -> None:
        self.num_commands += 1
        self.log.update(f"{self.now:.9f} {type(command).__name__} ".encode() + encode(command.message))
        self._on_command(self, command)
        epoch = self.epoch
        match command:
            case ToApi(api=name, message=to_api):
                api = self.apis[name]
                self.send(f"router-{name}", lambda: api.receive(epoch, to_api))
            case ToRuntime(runtime=runtime_id, message=to_runtime):
                self.send(f"router-{runtime_id}", lambda: self._to_runtime(epoch, runtime_id, to_runtime))
            case _:
                to_supervisor = command.message
                self.send("router-supervisor", lambda: self._to_supervisor(epoch, to_supervisor))

    def _to_runtime(self, epoch: int, runtime_id: RuntimeId, message: object) -> None:
        runtime = self.runtimes.get(runtime_id)
        if runtime is not None and runtime.connected:
            runtime.receive(message)

    def from_api(self, api: str, message: ApiToRouter) -> None:
        self.send(f"{api}-router", lambda: self._handle(FromApi(api, message)))

    def from_runtime(self, runtime: RuntimeId, message: RuntimeToRouter) -> None:
        self.send(f"{runtime}-router", lambda: self._handle(FromRuntime(message)))

    def _from_supervisor(self, message: SupervisorToRouter) -> None:
        epoch = (
            self.epoch
        )  # its socket is made anew for each router: what is on the way dies with the old one

        def deliver() -> None:
            if epoch == self.epoch:
                self._handle(FromSupervisor(message))

        self.send("supervisor-router", deliver)

    def restart_router(self) -> None:
        """Kill -9 and a new one: all that it knew is gone, and what the supervisor had not read yet."""
        for link, end in self._link_number.items():
            first = self._link_arrived.get(link, 0)
            lost = self._link_lost.setdefault(link, set())
            if link.startswith("router-"):
                lost.update(range(self.costs.survive(link, first, end), end))
            elif link.endswith("-router"):
                lost.update(range(first, self.costs.survive(link, first, end)))
        self.epoch += 1
        self._tick_at = None
        self.controller = Controller(self.config, epoch=self.epoch)
        self._from_supervisor(SupervisorHello(alive=list(self.runtimes)))

    # ------------------------------------------------------------ the supervisor

    def _to_supervisor(self, epoch: int, message: RouterToSupervisor) -> None:
        if epoch != self.epoch:
            return
        match message:
            case StartRuntime(runtime=runtime_id, model=model, device=device):
                if runtime_id in self.runtimes:
                    return
                runtime = self.runtimes[runtime_id] = self._make_runtime(runtime_id, model, device, self)
                runtime.start()
            case StopRuntime(runtime=runtime_id, reason=reason):
                if runtime_id in self.runtimes:
                    self.after(self.costs.stop_s, lambda: self.kill(runtime_id, reason, expected=True))
                else:
                    self._from_supervisor(
                        RuntimeExited(runtime=runtime_id, reason="was not running", expected=True)
                    )
            case _:
                self._from_supervisor(SupervisorHello(alive=list(self.runtimes)))

    def kill(
        self, runtime_id: RuntimeId, reason: str = "killed by signal 9", *, expected: bool = False
    ) -> None:
        """Its process ends; the supervisor sees it by its pid, the api_servers by silence and Lost."""
        if (runtime := self.runtimes.pop(runtime_id, None)) is not None:
            runtime.die()
            self._from_supervisor(RuntimeExited(runtime=runtime_id, reason=reason, expected=expected))

    # ------------------------------------------------------------ api_server to runtime

    def forward(
        self, api: VirtualApi, runtime_id: RuntimeId, key: RequestKey, tokens: tuple[int, int]
    ) -> None:
        """The body, straight to the runtime. One that is gone is known by the Lost that follows."""

        def deliver() -> None:
            if (runtime := self.runtimes.get(runtime_id)) is not None and runtime.connected:
                runtime.forward(api, key, *tokens)

        self.send(f"{api.name}-{runtime_id}", deliver)

    def cancel(self, api: VirtualApi, runtime_id: RuntimeId, key: RequestKey) -> None:
        def deliver() -> None:
            if (runtime := self.runtimes.get(runtime_id)) is not None:
                runtime.cancel(key)

        self.send(f"{api.name}-{runtime_id}", deliver)

    def answered(
        self, api: VirtualApi, runtime_id: RuntimeId, request: RequestId, attempt: int, part: str
    ) -> None:
        self.send(f"{runtime_id}-{api.name}", lambda: api.answer(request, attempt, part))

    # ------------------------------------------------------------ memory

    def held_bytes(self, device: str) -> int:
        """What the runtimes of a device really hold: never more than its budget, or the ledger would be wrong."""
        return sum(r.held_bytes for r in self.runtimes.values() if r.device == device)

    def free_bytes(self, device: str) -> int:
        budget = next(d.memory_bytes for d in self.config.devices if d.name == device)
        return budget - self.held_bytes(device)
