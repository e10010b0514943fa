"""A controller driven by hand: a test says what happens when, and reads the commands."""

from __future__ import annotations

from typing import TypeVar

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
    AdminReply,
    ApiBeat,
    ApiHello,
    AskAdmin,
    Finished,
    FirstToken,
    Grant,
    Hello,
    Load,
    Message,
    ModelStatus,
    Refuse,
    RequestId,
    RequestKey,
    RuntimeExited,
    RuntimeFacts,
    RuntimeId,
    RuntimeState,
    Sleep,
    Slept,
    Started,
    StartRuntime,
    Submit,
    SupervisorHello,
    Wake,
    Woke,
)
from prism_sgl.schedulers.controller import (
    Command,
    Controller,
    Event,
    FromApi,
    FromRuntime,
    FromSupervisor,
    Tick,
)

MIB = 1 << 20
WEIGHTS, FLOOR, OVERHEAD = 200 * MIB, 50 * MIB, 0
M = TypeVar("M", bound=Message)


def model(name: str, **keys: object) -> ModelConfig:
    keys = {"weights_bytes": WEIGHTS, "min_kv_bytes": FLOOR, "kv_bytes_per_token": 1000, **keys}
    return ModelConfig(name=name, path="", context_tokens=2048, slo=Slo(ttft_s=1.0), **keys)  # type: ignore[arg-type]


def config(
    *models: ModelConfig, budget_mib: int = 600, devices: int = 1, max_queue: int = 100, **scheduler: float
) -> Config:
    """Two models of 250 MiB fit a device at the same time, unless told otherwise."""
    return Config(
        server=ServerConfig(max_queue=max_queue),
        memory=MemoryConfig(),
        scheduler=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
        devices=tuple(
            DeviceConfig(name=f"host{i}", kind="host", memory_bytes=budget_mib * MIB) for i in range(devices)
        ),
        models={m.name: m for m in models},
    )


def facts(**keys: int) -> RuntimeFacts:
    known = {
        "weights_bytes": WEIGHTS,
        "overhead_bytes": OVERHEAD,
        "kv_bytes_per_token": 1000,
        "max_request_tokens": 2048,
        "floor_bytes": FLOOR,
        "ceiling_bytes": 2 * FLOOR,
        "max_running_requests": 8,
        "block_tokens": 1,
    }
    return RuntimeFacts(**{**known, **keys})


def hello_of(
    runtime: RuntimeId,
    state: RuntimeState = RuntimeState.AWAKE,
    *running: str,
    known: RuntimeFacts | None = None,
    start_s: float = 0.0,
) -> Hello:
    """``running``: first attempts that it has."""
    name, _, rest = runtime.partition("@")
    return Hello(
        runtime=runtime,
        model=name,
        device=rest.rpartition(".")[0],
        state=state,
        facts=known or facts(),
        running=[RequestKey(RequestId(request), 1) for request in running],
        start_s=start_s,
    )


class ByHand:
    """Owner of a controller and its time. Each call returns the commands that it brought about."""

    def __init__(self, config: Config, *, epoch: int = 1, hello: bool = True) -> None:
        self.controller = Controller(config, epoch=epoch)
        self.now = 1000.0
        self.all: list[Command] = []
        if hello:
            self.api(ApiHello(api="api"))
            self.supervisor(SupervisorHello())

    def _do(self, event: Event) -> list[Command]:
        commands = self.controller.handle(event, self.now)
        self.controller.check()
        self.all += commands
        return commands

    def api(self, message: object, api: str = "api") -> list[Command]:
        return self._do(FromApi(api, message))  # type: ignore[arg-type]

    def supervisor(self, message: object) -> list[Command]:
        return self._do(FromSupervisor(message))  # type: ignore[arg-type]

    def runtime(self, message: object) -> list[Command]:
        return self._do(FromRuntime(message))  # type: ignore[arg-type]

    def tick(self) -> list[Command]:
        return self._do(Tick())

    def wait(self, seconds: float, *, beats: bool = True) -> list[Command]:
        """Time passes; the controller is called when it wants to be, and its api_server is alive."""
        commands: list[Command] = []
        end = self.now + seconds
        while (next_s := self.controller.next_tick(self.now)) is not None and self.now + next_s <= end:
            self.now += max(next_s, 0.001)
            commands += self.tick()
            if beats:
                commands += self.api(ApiBeat(api="api"))
        self.now = max(self.now, end)
        return commands

    # ------------------------------------------------------------ often needed

    def state(self, name: str) -> ModelStatus:
        return next(m for m in self.controller.status(self.now).models if m.name == name)

    def id(self, name: str) -> RuntimeId:
        runtime = self.state(name).runtime
        assert runtime is not None
        return runtime

    def hello(self, name: str, known: RuntimeFacts | None = None) -> list[Command]:
        return self.runtime(hello_of(self.id(name), known=known))

    def start_all(self) -> None:
        """Say Hello for each runtime that is started and Slept for each told to sleep, until all is calm."""
        seen = 0
        while seen < len(self.all):
            command, seen = self.all[seen], seen + 1
            match command.message:
                case StartRuntime(runtime=runtime, model=name) if self.state(name).runtime == runtime:
                    if self.state(name).state == "starting":
                        self.hello(name)
                case Sleep(runtime=runtime):
                    self.slept(runtime)

    def submit(self, request: str, name: str = "chat", attempt: int = 1, **keys: object) -> list[Command]:
        keys = {"prompt_tokens": 10, "max_new_tokens": 10, "stream": True, **keys}
        submit = Submit(request=RequestId(request), attempt=attempt, model=name, **keys)  # type: ignore[arg-type]
        return self.api(submit)

    def first_token(self, request: str, name: str = "chat", attempt: int = 1) -> list[Command]:
        key = {"runtime": self.id(name), "request": RequestId(request), "attempt": attempt}
        return self.runtime(Started(**key)) + self.runtime(FirstToken(**key, ttft_s=0.05))  # type: ignore[arg-type]

    def finish(self, request: str, name: str = "chat", attempt: int = 1) -> list[Command]:
        return self.runtime(
            Finished(
                runtime=self.id(name),
                request=RequestId(request),
                attempt=attempt,
                outcome="ok",
                status=200,
                total_s=0.1,
            )
        )

    def slept(self, runtime: RuntimeId) -> list[Command]:
        return self.runtime(Slept(runtime=runtime, seconds=0.02))

    def woke(self, name: str) -> list[Command]:
        return self.runtime(Woke(runtime=self.id(name), seconds=0.2))

    def load(self, name: str, wanted_bytes: int = 0, in_flight: int = 0) -> list[Command]:
        return self.runtime(
            Load(
                runtime=self.id(name),
                state=self.state(name).state,
                weights_bytes=WEIGHTS,
                kv_bytes=FLOOR,
                wanted_bytes=wanted_bytes,
                in_flight=in_flight,
            )
        )

    def exit(self, name: str, reason: str = "killed by signal 9", *, expected: bool = False) -> list[Command]:
        return self.supervisor(RuntimeExited(runtime=self.id(name), reason=reason, expected=expected))

    def admin(self, verb: str, name: str = "chat", ask: str = "a") -> list[Command]:
        return self.api(AskAdmin(ask=ask, verb=verb, model=name))


def of(commands: list[Command], kind: type[M]) -> list[M]:
    return [c.message for c in commands if isinstance(c.message, kind)]


def granted(commands: list[Command]) -> list[str]:
    return [grant.request for grant in of(commands, Grant)]


def refusals(commands: list[Command]) -> list[tuple[str, int, str]]:
    return [(r.request, r.status, r.code) for r in of(commands, Refuse)]


def slept_models(commands: list[Command]) -> list[str]:
    return [s.runtime.partition("@")[0] for s in of(commands, Sleep)]


def woken_models(commands: list[Command]) -> list[str]:
    return [w.runtime.partition("@")[0] for w in of(commands, Wake)]


def started_models(commands: list[Command]) -> list[str]:
    return [s.model for s in of(commands, StartRuntime)]


def replies(commands: list[Command]) -> list[tuple[str, int]]:
    return [(r.ask, r.status) for r in of(commands, AdminReply)]
