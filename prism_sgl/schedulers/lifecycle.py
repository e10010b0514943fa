"""The runtimes side: starts, stops, sleeps and wakes are asked for here, and their ends arrive here."""

from __future__ import annotations

import math

from prism_sgl.messages import (
    AskHello,
    Hello,
    Introduce,
    Load,
    RuntimeExited,
    RuntimeId,
    RuntimeState,
    RuntimeToRouter,
    Sleep,
    SleepRefused,
    Slept,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    Wake,
    WakeFailed,
    Woke,
)
from prism_sgl.schedulers.events import Outbox
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.requests import RETRY_FAILED_S, RequestDesk
from prism_sgl.schedulers.state import (
    ASLEEP,
    AWAKE,
    COLD,
    DRAINING,
    FAILED,
    STARTING,
    STOPPING,
    WAKING,
    Device,
    Fleet,
    Model,
)

_ASK_AGAIN_S = 1.0
_MOST_STRANGERS = 1024
# A command whose effect does not show in the heartbeats is sent again. Longer than a sleep may take (1.5 s).
_RESEND_S = 10.0
_LONGEST_BACKOFF_S = 60.0
_HEALTHY_S = 60.0
_AUTOMATIC_RETRIES = 3
_FIRST_WAKE_RETRY_S = 0.2
_LONGEST_WAKE_RETRY_S = 2.0


class Lifecycle:
    """Owner of the dealings with the supervisor and the runtimes."""

    def __init__(self, epoch: int, fleet: Fleet, table: RequestTable, desk: RequestDesk, out: Outbox) -> None:
        self._epoch = epoch
        self._fleet = fleet
        self._table = table
        self._desk = desk
        self._out = out
        self._num_started = 0
        self._asked_at: dict[RuntimeId, float] = {}
        self._supervisor_asked_at = -math.inf
        self.supervisor_known = False  # until it has listed what is alive, nothing may be started

    # ------------------------------------------------------------ commands

    def start(self, model: Model, device: Device, now: float, why: str) -> None:
        self._num_started += 1
        runtime = RuntimeId(f"{model.name}@{device.name}.{self._epoch}-{self._num_started}")
        self._fleet.start(model, device, runtime, now, why)
        model.retry_at = math.inf
        self._out.supervisor(StartRuntime(runtime=runtime, model=model.name, device=device.name))

    def stop(self, model: Model, now: float, why: str) -> None:
        """End its process. It is charged until the supervisor says that it is gone."""
        assert model.runtime.id is not None
        self._fleet.move(model, STOPPING, now, why)
        self._out.supervisor(StopRuntime(runtime=model.runtime.id, reason=why))

    def wake(self, model: Model, now: float, why: str) -> None:
        device = self._fleet.devices[model.runtime.device or ""]
        needed_bytes = self._fleet.mapped_bytes(model) - model.runtime.charged_bytes
        assert needed_bytes <= device.free_bytes, "a wake needs its room first"
        self._fleet.move(model, WAKING, now, why)
        self._send_wake(model, now)

    def drain(self, model: Model, now: float, why: str, *, keep_weights: bool = False) -> None:
        """No more grants; it sleeps as soon as nothing is in flight, at once if nothing is.

        ``keep_weights`` where neighbours want the room: they take what they need of it (messages.Sleep).
        """
        model.runtime.keep_weights = keep_weights
        self._fleet.move(model, DRAINING, now, why)
        self.sleep_if_drained(model, now)

    def sleep_if_drained(self, model: Model, now: float) -> None:
        runtime = model.runtime
        if (
            runtime.state is DRAINING
            and runtime.sleep_sent_at is None
            and not self._table.running(runtime.id)
        ):
            self._send_sleep(model, now)

    def call_off_drain(self, model: Model, now: float) -> None:
        """The room is no longer wanted. Only before Sleep was sent: that is answered first."""
        if model.runtime.state is DRAINING and model.runtime.sleep_sent_at is None:
            self._fleet.move(model, AWAKE, now, "its memory is no longer wanted")

    def _send_sleep(self, model: Model, now: float) -> None:
        assert model.runtime.id is not None
        model.runtime.sleep_sent_at = now
        self._out.runtime(
            model.runtime.id, Sleep(runtime=model.runtime.id, keep_weights=model.runtime.keep_weights)
        )

    def _send_wake(self, model: Model, now: float) -> None:
        assert model.runtime.id is not None
        model.runtime.wake_sent_at = now
        self._out.runtime(model.runtime.id, Wake(runtime=model.runtime.id))

    # ------------------------------------------------------------ the supervisor's word

    def ask_supervisor(self, now: float) -> None:
        if now - self._supervisor_asked_at >= _ASK_AGAIN_S:
            self._supervisor_asked_at = now
            self._out.supervisor(Introduce(epoch=self._epoch))

    def supervisor_hello(self, message: SupervisorHello, now: float) -> bool:
        """True for the first one. Runtimes exist if the supervisor lists them or we had it start them: a Hello
        that a dead worker left in a socket must not bring it back to life. One that is missing from a later list
        was reported before it as exited, or was started after it: nothing to learn from that."""
        first, self.supervisor_known = not self.supervisor_known, True
        for runtime_id in message.alive:
            if self._fleet.by_id(runtime_id) is None and not self._fleet.has_exited(runtime_id):
                self._adopt(runtime_id, now)
        self._desk.lose_unlisted(now)
        return first

    def _adopt(self, runtime_id: RuntimeId, now: float) -> None:
        place = self._fleet.parse(runtime_id)
        if place is None or place[0].runtime.id is not None:
            reason = "its model has a runtime already" if place else "its model or device is not configured"
            self._fleet.note(f"{runtime_id}: stopped ({reason})")
            self._out.supervisor(StopRuntime(runtime=runtime_id, reason=reason))
            return
        model, device = place
        self._fleet.adopt(model, device, runtime_id, now)
        self._ask_hello(runtime_id, now)

    def runtime_exited(self, message: RuntimeExited, now: float) -> None:
        model = self._fleet.by_id(message.runtime)
        if model is None:
            self._fleet.remember_exit(message.runtime)
            self._desk.lose(message.runtime, message.reason, now)
        else:
            self._exited(model, message.reason, now, expected=message.expected)

    def _exited(self, model: Model, reason: str, now: float, *, expected: bool) -> None:
        runtime = model.runtime
        assert runtime.id is not None
        if expected or runtime.state is STOPPING:
            model.failure = ""
            self._fleet.exited(model, COLD, now, reason if expected else "stopped")
        elif runtime.known:
            self._back_off(model, now)
            wait_s = model.not_before - now
            self._fleet.exited(model, FAILED, now, f"{reason}; starts again in {wait_s:.0f} s")
            model.failure, model.start_wanted = "", True  # its queue is kept: it was well before
        else:
            self._failed_to_load(model, reason, now)
        self._desk.lose(runtime.id, reason, now)

    def _failed_to_load(self, model: Model, reason: str, now: float) -> None:
        model.load_failures += 1
        model.failure, model.start_wanted = reason, False
        self._fleet.exited(model, FAILED, now, reason)
        if model.load_failures <= _AUTOMATIC_RETRIES:
            model.retry_at = now + min(_LONGEST_BACKOFF_S, 2.0 ** (model.load_failures - 1))
        text = f"{model.name} failed to load: {reason}"
        retry_s = max(1.0, min(model.retry_at, now + RETRY_FAILED_S) - now)
        self._desk.refuse_all(model, "model_failed", text, retry_s, now)

    def _back_off(self, model: Model, now: float) -> None:
        """1, 2, 4 .. 60 s, from the start again after a healthy minute."""
        if now - model.runtime.ready_since >= _HEALTHY_S:
            model.crashes = 0
        model.not_before = now + min(_LONGEST_BACKOFF_S, 2.0**model.crashes)
        model.crashes = min(model.crashes + 1, 10)

    def forgive(self, model: Model) -> None:
        """An operator or a new request asks for a model that failed: try at once."""
        model.not_before, model.crashes = 0.0, 0
        model.load_failures, model.retry_at = 0, math.inf

    # ------------------------------------------------------------ the runtimes' word

    def find(self, message: RuntimeToRouter, now: float) -> Model | None:
        """The model whose runtime speaks. A stranger is asked for its Hello, and the supervisor for its list."""
        model = self._fleet.by_id(message.runtime)
        if model is not None:
            model.runtime.heard_at = now
            if not model.runtime.known and not isinstance(message, Hello):
                self._ask_hello(message.runtime, now)
            return model
        if not self._fleet.has_exited(message.runtime):
            if isinstance(message, Hello):
                self.ask_supervisor(now)
            else:
                self._ask_hello(message.runtime, now)
        return None

    def _ask_hello(self, runtime: RuntimeId, now: float) -> None:
        if now - self._asked_at.get(runtime, -_ASK_AGAIN_S) >= _ASK_AGAIN_S:
            if len(self._asked_at) >= _MOST_STRANGERS:
                self._asked_at.clear()
            self._asked_at[runtime] = now
            self._out.runtime(runtime, AskHello(epoch=self._epoch))

    def hello(self, model: Model, message: Hello, now: float) -> None:
        runtime = model.runtime
        self._fleet.learn(model, message.facts)
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
            self._fleet.told(model, told, now)
        else:
            self._fleet.move(model, AWAKE, now, f"started in {message.start_s:.1f} s")
        runtime.known, runtime.ready_since = True, now
        model.failure, model.start_wanted, model.load_failures, model.shortages = "", False, 0, 0
        self._asked_at.pop(message.runtime, None)

    def slept(self, model: Model, message: Slept, now: float) -> None:
        runtime = model.runtime
        if runtime.state is not DRAINING or runtime.sleep_sent_at is None:
            return  # said twice
        model.sleeps, model.last_sleep_s = model.sleeps + 1, message.seconds
        self._fleet.move(model, ASLEEP, now, f"{model.reason}; slept in {message.seconds:.3f} s")

    def sleep_refused(self, model: Model, message: SleepRefused, now: float) -> None:
        runtime = model.runtime
        if runtime.state is DRAINING and runtime.sleep_sent_at is not None:
            self._fleet.move(model, AWAKE, now, f"would not sleep: {message.reason}")
            # It was not idle: not asked again at once, as one that never served would be.
            runtime.idle_since = runtime.awake_since = now
            runtime.served = True

    def woke(self, model: Model, message: Woke, now: float) -> None:
        if model.runtime.state is not WAKING:
            return
        model.wakes, model.last_wake_s, model.shortages = model.wakes + 1, message.seconds, 0
        self._fleet.move(model, AWAKE, now, f"woke in {message.seconds:.3f} s")

    def wake_failed(self, model: Model, message: WakeFailed, now: float) -> None:
        if model.runtime.state is not WAKING:
            return
        if message.shortage:
            wait_s = min(_LONGEST_WAKE_RETRY_S, _FIRST_WAKE_RETRY_S * 2.0**model.shortages)
            model.shortages = min(model.shortages + 1, 10)
            model.not_before = now + wait_s
            self._fleet.move(model, ASLEEP, now, f"{message.reason}; tried again in {wait_s:.1f} s")
        else:
            self._back_off(model, now)
            model.start_wanted = True
            self.stop(model, now, f"could not wake: {message.reason}")

    def load(self, model: Model, message: Load, now: float) -> None:
        runtime = model.runtime
        runtime.weights_bytes, runtime.kv_bytes = message.weights_bytes, message.kv_bytes
        if not runtime.known:
            return
        if message.wanted_bytes <= 0 or runtime.state is not AWAKE:
            runtime.wanted_since = None
        elif runtime.wanted_since is None:
            runtime.wanted_since = now
        if message.in_flight == 0 and self._table.running(runtime.id):
            self._desk.reconcile(model, now)
        self._compare(model, message.state, now)

    def _compare(self, model: Model, told: RuntimeState, now: float) -> None:
        """Messages of one runtime stay in order, so its word and ours differ for long only if a frame was lost."""
        runtime = model.runtime
        if runtime.state is AWAKE and told is ASLEEP:
            self._fleet.move(model, DRAINING, now, "says that it sleeps")
            self._fleet.move(model, ASLEEP, now, "says that it sleeps")
        elif runtime.state is ASLEEP and told is AWAKE:
            self._fleet.move(model, WAKING, now, "says that it is awake")
            self._fleet.move(model, AWAKE, now, "says that it is awake")
        elif runtime.state is DRAINING and told is AWAKE and _is_old(runtime.sleep_sent_at, now):
            self._send_sleep(model, now)
        elif runtime.state is DRAINING and told is ASLEEP and _is_old(runtime.sleep_sent_at, now):
            self._fleet.move(model, ASLEEP, now, "says that it sleeps")
        elif runtime.state is WAKING and told is AWAKE and _is_old(runtime.since, now):
            self._fleet.move(model, AWAKE, now, "says that it is awake")
        elif runtime.state is WAKING and told is ASLEEP and _is_old(runtime.wake_sent_at, now):
            self._send_wake(model, now)


def _is_old(since: float | None, now: float) -> bool:
    return since is not None and now - since >= _RESEND_S
