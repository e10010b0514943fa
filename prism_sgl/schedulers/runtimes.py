"""The runtimes' side: what they say of themselves, and what follows for their states."""

from __future__ import annotations

from prism_sgl.messages import (
    Hello,
    Load,
    RuntimeState,
    RuntimeToRouter,
    SleepRefused,
    Slept,
    WakeFailed,
    Woke,
)
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.records import ASLEEP, AWAKE, DRAINING, STARTING, WAKING, Role, Runtime
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.requests import RequestDesk
from prism_sgl.schedulers.supervisor import SupervisorDesk

# A command whose effect does not show in the heartbeats is sent again. Longer than a sleep may take (1.5 s).
_RESEND_S = 10.0
_FIRST_WAKE_RETRY_S = 0.2
_LONGEST_WAKE_RETRY_S = 2.0


class RuntimeDesk:
    """Brings the fleet up to date with what runtimes say; owns nothing."""

    def __init__(
        self,
        fleet: Fleet,
        table: RequestTable,
        desk: RequestDesk,
        lifecycle: Lifecycle,
        supervisor: SupervisorDesk,
    ) -> None:
        self._fleet = fleet
        self._table = table
        self._desk = desk
        self._lifecycle = lifecycle
        self._supervisor = supervisor

    def find(self, message: RuntimeToRouter, now: float) -> Runtime | None:
        """The runtime that speaks. A stranger is asked for its Hello, and the supervisor for its list."""
        runtime = self._fleet.by_id(message.runtime)
        if runtime is not None:
            runtime.heard_at = now
            if not runtime.known and not isinstance(message, Hello):
                self._lifecycle.ask_hello(message.runtime, now)
            return runtime
        if not self._fleet.has_exited(message.runtime):
            if isinstance(message, Hello):
                self._supervisor.ask(now)
            else:
                self._lifecycle.ask_hello(message.runtime, now)
        return None

    def hello(self, runtime: Runtime, message: Hello, now: float) -> None:
        model = runtime.model
        self._fleet.learn(model, message.facts)
        runtime.ceiling_bytes = message.facts.ceiling_bytes
        for key in message.running:
            if (request := self._table.get(key.request)) is not None:
                if request.attempt == key.attempt and request.runtime == runtime.id:
                    self._table.started(request, now)
            elif not self._table.is_over(key.request, key.attempt):
                self._desk.adopt(key, message.runtime, None, now)
        if runtime.known or runtime.state is not STARTING:
            runtime.known = True
            return
        told = message.state if message.state in (ASLEEP, WAKING) else AWAKE
        if runtime.adopted:
            self._fleet.told(runtime, told, now)
        else:
            self._fleet.move(runtime, AWAKE, now, f"started in {message.start_s:.1f} s")
            model.last_start_s = message.start_s
        runtime.known, runtime.ready_since = True, now
        model.failure, model.start_wanted, model.load_failures, model.shortages = "", False, 0, 0
        self._lifecycle.heard_hello(message.runtime)

    def slept(self, runtime: Runtime, message: Slept, now: float) -> None:
        model = runtime.model
        if runtime.state is not DRAINING or runtime.sleep_sent_at is None:
            return  # said twice
        model.sleeps, model.last_sleep_s = model.sleeps + 1, message.seconds
        self._table.set_aside(message.runtime)
        self._fleet.move(runtime, ASLEEP, now, f"{model.reason}; slept in {message.seconds:.3f} s")

    def sleep_refused(self, runtime: Runtime, message: SleepRefused, now: float) -> None:
        if runtime.state is DRAINING and runtime.sleep_sent_at is not None:
            self._fleet.move(runtime, AWAKE, now, f"would not sleep: {message.reason}")
            # It was not idle: not asked again at once, as one that never served would be.
            runtime.idle_since = runtime.awake_since = runtime.refused_at = now
            runtime.served = True

    def woke(self, runtime: Runtime, message: Woke, now: float) -> None:
        if runtime.state is not WAKING:
            return
        model = runtime.model
        model.wakes, model.last_wake_s, model.shortages = model.wakes + 1, message.seconds, 0
        self._fleet.move(runtime, AWAKE, now, f"woke in {message.seconds:.3f} s")

    def wake_failed(self, runtime: Runtime, message: WakeFailed, now: float) -> None:
        if runtime.state is not WAKING:
            return
        model = runtime.model
        if runtime is not model.runtime:
            self._fleet.move(runtime, ASLEEP, now, message.reason)
        else:
            wait_s = min(_LONGEST_WAKE_RETRY_S, _FIRST_WAKE_RETRY_S * 2.0**model.shortages)
            model.shortages = min(model.shortages + 1, 10)
            model.not_before = now + wait_s
            self._fleet.move(runtime, ASLEEP, now, f"{message.reason}; tried again in {wait_s:.1f} s")

    def load(self, runtime: Runtime, message: Load, now: float) -> None:
        runtime.weights_bytes, runtime.kv_bytes = message.weights_bytes, message.kv_bytes
        if not runtime.known:
            return
        if message.wanted_bytes <= 0 or runtime.state is not AWAKE:
            runtime.wanted_since = None
        elif runtime.wanted_since is None:
            runtime.wanted_since = now
        if message.in_flight == 0 and self._table.running(runtime.id):
            self._desk.reconcile(runtime, now)
        self._compare(runtime, message.state, now)

    def _compare(self, runtime: Runtime, told: RuntimeState, now: float) -> None:
        """Messages of one runtime stay in order, so its word and ours differ for long only if a frame was lost."""
        if runtime.state is AWAKE and runtime.role is Role.SPARE:
            self._fleet.touch(runtime.model)  # it would not sleep when it was told to
        if runtime.state is AWAKE and told is ASLEEP:
            self._fleet.move(runtime, DRAINING, now, "says that it sleeps")
            self._fleet.move(runtime, ASLEEP, now, "says that it sleeps")
        elif runtime.state is ASLEEP and told is AWAKE:
            self._fleet.move(runtime, WAKING, now, "says that it is awake")
            self._fleet.move(runtime, AWAKE, now, "says that it is awake")
        elif runtime.state is DRAINING and told is AWAKE and _is_old(runtime.sleep_sent_at, now):
            self._lifecycle.send_sleep(runtime, now)
        elif runtime.state is DRAINING and told is ASLEEP and _is_old(runtime.sleep_sent_at, now):
            self._fleet.move(runtime, ASLEEP, now, "says that it sleeps")
        elif runtime.state is WAKING and told is AWAKE and _is_old(runtime.since, now):
            self._fleet.move(runtime, AWAKE, now, "says that it is awake")
        elif runtime.state is WAKING and told is ASLEEP and _is_old(runtime.wake_sent_at, now):
            self._lifecycle.send_wake(runtime, now)


def _is_old(since: float | None, now: float) -> bool:
    return since is not None and now - since >= _RESEND_S
