"""The simulator's peers of the router: a runtime that costs what it is told, an api_server with clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from prism_sgl.messages import (
    Abandon,
    ApiBeat,
    ApiHello,
    AskHello,
    Finished,
    FirstToken,
    Grant,
    Hello,
    Introduce,
    Load,
    Lost,
    Refuse,
    RequestId,
    RequestKey,
    RuntimeId,
    RuntimeState,
    Sleep,
    SleepRefused,
    Slept,
    Started,
    Submit,
    Wake,
    WakeFailed,
    Woke,
)

if TYPE_CHECKING:
    from prism_sgl.schedulers.simulator import World


class VirtualRuntime:
    """One engine: takes commands one after the other, prefills one request at a time, decodes all at once."""

    def __init__(self, runtime: RuntimeId, model: str, device: str, world: World) -> None:
        self.id, self.model, self.device = runtime, model, device
        self._world = world
        self._facts = world.facts[model]
        self.state = RuntimeState.STARTING
        self.connected = False
        self.alive = True
        self.held_bytes = 0
        self.running: dict[
            RequestKey, tuple[float, int]
        ] = {}  # when it was taken up, and tokens of its answer
        self._seen: set[RequestKey] = set()
        self._commands: list[object] = []
        self._obeying = False
        self._prefill_free_at = 0.0
        self._aside: list[Callable[[], None]] = []  # what was due while it slept

    # ------------------------------------------------------------ life

    def start(self) -> None:
        self._world.after(self._world.costs.start_s, self._up)

    def die(self) -> None:
        self.alive, self.connected, self.held_bytes = False, False, 0

    def _up(self) -> None:
        if not self.alive:
            return
        reason = self._world.load_fails(self.id)
        if reason is None and not self._map():
            reason = "no memory"
        if reason is not None:
            self._world.kill(self.id, reason)
            return
        self.state, self.connected = RuntimeState.AWAKE, True
        self._say_hello()
        self._beat()

    def _map(self) -> bool:
        """Weights, the floor and the overhead at once, or nothing."""
        facts = self._facts
        needed = facts.weights_bytes + facts.floor_bytes + facts.overhead_bytes - self.held_bytes
        if needed > self._world.free_bytes(self.device):
            return False
        self.held_bytes += needed
        return True

    def _say_hello(self) -> None:
        self._world.from_runtime(
            self.id,
            Hello(
                runtime=self.id,
                model=self.model,
                device=self.device,
                state=self.state,
                facts=self._facts,
                running=list(self.running),
                start_s=self._world.costs.start_s,
            ),
        )

    def _beat(self) -> None:
        if self.alive:
            kv = self._facts.floor_bytes if self.state is RuntimeState.AWAKE else 0
            load = Load(
                runtime=self.id,
                state=self.state,
                weights_bytes=max(0, self.held_bytes - kv - self._facts.overhead_bytes),
                kv_bytes=kv,
                wanted_bytes=0,
                in_flight=len(self.running),
            )
            self._world.from_runtime(self.id, load)
            self._world.after(self._world.costs.beat_s, self._beat)

    # ------------------------------------------------------------ commands of the router

    def receive(self, message: object) -> None:
        self._commands.append(message)
        self._obey()

    def _obey(self) -> None:
        while self._commands and not self._obeying and self.alive:
            costs = self._world.costs
            match self._commands.pop(0):
                case AskHello():
                    self._say_hello()
                case Sleep(preempt=False) if self.running:
                    busy = SleepRefused(runtime=self.id, reason="requests are being answered")
                    self._world.from_runtime(self.id, busy)
                case Sleep(preempt=preempt):
                    self._obeying = True
                    self._world.after(costs.sleep_s, partial(self._slept, preempt))
                case Wake():
                    self._obeying = True
                    if self.state is not RuntimeState.AWAKE:
                        self.state = RuntimeState.WAKING
                    self._world.after(costs.wake_s, self._woke)

    def _slept(self, preempt: bool) -> None:
        if not self.alive:
            return
        self._obeying = False
        if self.running and not preempt:
            busy = SleepRefused(runtime=self.id, reason="a request came in")
            self._world.from_runtime(self.id, busy)
        else:
            facts = self._facts
            self.state = RuntimeState.ASLEEP
            self.held_bytes = facts.overhead_bytes - facts.awake_overhead_bytes
            self._world.from_runtime(self.id, Slept(runtime=self.id, seconds=self._world.costs.sleep_s))
        self._obey()

    def _woke(self) -> None:
        if not self.alive:
            return
        self._obeying = False
        reason = self._world.wake_fails(self.id) if self.state is RuntimeState.WAKING else None
        if reason is not None:
            self._world.kill(self.id, reason)
        elif self._map():
            self.state = RuntimeState.AWAKE
            self._world.from_runtime(self.id, Woke(runtime=self.id, seconds=self._world.costs.wake_s))
            aside, self._aside = self._aside, []
            for go_on in aside:  # prompts and answers so far are prefilled again
                self._world.after(self._world.costs.prefill_s, partial(self._when_awake, go_on))
        else:
            self.state = RuntimeState.ASLEEP
            self._world.from_runtime(self.id, WakeFailed(runtime=self.id, reason="memory did not come"))
        self._obey()

    # ------------------------------------------------------------ requests of an api_server

    def forward(self, api: VirtualApi, key: RequestKey, prompt_tokens: int, new_tokens: int) -> None:
        if key in self._seen:
            return  # deduplicated on (id, attempt)
        self._seen.add(key)
        if self.state is not RuntimeState.AWAKE:
            self._world.answered(api, self.id, key.request, key.attempt, "broke")
            return
        self.running[key] = (self._world.now, new_tokens)
        world, costs = self._world, self._world.costs
        started = Started(runtime=self.id, request=key.request, attempt=key.attempt)
        world.from_runtime(self.id, started)
        taken_at = world.now
        begin = max(world.now, self._prefill_free_at)
        first_at = begin + costs.prefill_s + costs.prefill_s_per_token * prompt_tokens
        self._prefill_free_at = first_at

        def first() -> None:
            if key in self.running:
                ttft_s = world.now - taken_at
                token = FirstToken(runtime=self.id, request=key.request, attempt=key.attempt, ttft_s=ttft_s)
                world.from_runtime(self.id, token)
                world.answered(api, self.id, key.request, key.attempt, "first")
                decode_s = costs.decode_s_per_token * new_tokens
                world.after(decode_s, lambda: self._when_awake(lambda: self._end(api, key, "ok")))

        world.after(first_at - world.now, lambda: self._when_awake(first))

    def _when_awake(self, action: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.state is RuntimeState.AWAKE:
            action()
        else:
            self._aside.append(action)

    def cancel(self, key: RequestKey) -> None:
        self._seen.add(key)
        if key in self.running:
            self._end(None, key, "cancelled")

    def _end(self, api: VirtualApi | None, key: RequestKey, outcome: str) -> None:
        if not self.alive or key not in self.running:
            return
        taken_at, new_tokens = self.running.pop(key)
        if api is not None:
            self._world.completed.append(key.request)
            self._world.answered(api, self.id, key.request, key.attempt, "last")
        finished = Finished(
            runtime=self.id,
            request=key.request,
            attempt=key.attempt,
            outcome=outcome,
            status=200,
            total_s=self._world.now - taken_at,
            completion_tokens=new_tokens if outcome == "ok" else 0,
        )
        self._world.from_runtime(self.id, finished)


@dataclass
class Client:
    """A request as its client sees it, and what became of it."""

    id: RequestId
    model: str
    prompt_tokens: int
    new_tokens: int
    priority: int
    arrived_at: float
    attempt: int = 1
    runtime: RuntimeId | None = None  # granted there
    first_at: float | None = None
    ends: list[str] = field(default_factory=list)  # "ok", "refused", "error", "abandoned": one in the end
    ended_at: float | None = None
    refusal: Refuse | None = None
    grants: list[Grant] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.ends)


class VirtualApi:
    """One api_server, as its contract with the router has it (controller.py)."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self._world = world
        self._epoch = 0
        self.clients: dict[RequestId, Client] = {}

    def beat(self) -> None:
        self._world.from_api(self.name, ApiBeat(api=self.name))
        self._world.after(1.0, self.beat)

    def say_hello(self) -> None:
        granted = [
            (RequestKey(c.id, c.attempt), c.runtime)
            for c in self.clients.values()
            if c.runtime and not c.over
        ]
        self._world.from_api(self.name, ApiHello(api=self.name, granted=granted))
        for client in self.clients.values():
            if not client.over and client.runtime is None:
                self._submit(client)

    def request(
        self, request: str, model: str, prompt_tokens: int = 40, new_tokens: int = 20, priority: int = 0
    ) -> Client:
        client = Client(RequestId(request), model, prompt_tokens, new_tokens, priority, self._world.now)
        self.clients[client.id] = client
        self._submit(client)
        return client

    def _submit(self, client: Client) -> None:
        submit = Submit(
            request=client.id,
            attempt=client.attempt,
            model=client.model,
            prompt_tokens=client.prompt_tokens,
            max_new_tokens=client.new_tokens,
            stream=True,
            priority=client.priority,
            waited_s=self._world.now - client.arrived_at,
        )
        self._world.from_api(self.name, submit)

    def abandon(self, request: RequestId) -> None:
        """The client hangs up."""
        client = self.clients[request]
        if not client.over:
            self._end(client, "abandoned")
            if client.runtime is not None:
                self._world.cancel(self, client.runtime, RequestKey(client.id, client.attempt))
            self._world.from_api(self.name, Abandon(request=client.id))

    def receive(self, epoch: int, message: object) -> None:
        if epoch < self._epoch:
            return  # of a router that is dead: its connection was closed before the new one's was made
        match message:
            case Introduce(epoch=epoch_told):
                self._epoch = epoch_told
                self.say_hello()
            case Grant():
                self._granted(message)
            case Refuse(request=request):
                client = self.clients[request]
                if not client.over:
                    client.refusal = message
                    self._end(client, "refused")
            case Lost(request=request, attempt=attempt):
                client = self.clients[request]
                if not client.over and client.attempt == attempt:
                    self._retry(client)

    def _granted(self, grant: Grant) -> None:
        client = self.clients.get(grant.request)
        if client is None or client.over or client.attempt != grant.attempt:
            self._world.from_api(self.name, Abandon(request=grant.request)) if (
                client is None or client.over
            ) else None
            return
        if client.runtime is not None:
            return
        client.runtime = grant.runtime
        client.grants.append(grant)
        key = RequestKey(client.id, client.attempt)
        self._world.forward(self, grant.runtime, key, (client.prompt_tokens, client.new_tokens))

    def _retry(self, client: Client) -> None:
        """Once more, if no byte was sent and it is the first time."""
        if client.first_at is not None or client.attempt == 2:
            self._end(client, "error")
            self._world.from_api(self.name, Abandon(request=client.id))
            return
        client.attempt, client.runtime = 2, None
        self._submit(client)

    def answer(self, request: RequestId, attempt: int, part: str) -> None:
        client = self.clients[request]
        if client.over or client.attempt != attempt:
            return
        if part == "broke":
            self._retry(client)
        elif part == "first":
            client.first_at = self._world.now
        else:
            self._end(client, "ok")

    def _end(self, client: Client, how: str) -> None:
        client.ends.append(how)
        client.ended_at = self._world.now
