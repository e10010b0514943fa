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
    Role,
    Runtime,
)

_ASK_AGAIN_S = 1.0
_MOST_STRANGERS = 1024
# A command whose effect does not show in the heartbeats is sent again. Longer than a sleep may take (1.5 s).
_RESEND_S = 10.0
_LONGEST_BACKOFF_S = 60.0
_HEALTHY_S = 60.0
# The router knows that an answer is over before its last bytes have reached the api_server.
_LAST_WORDS_S = 1.0
_AUTOMATIC_RETRIES = 3
_FIRST_WAKE_RETRY_S = 0.2
_LONGEST_WAKE_RETRY_S = 2.0


class Lifecycle:
    """Owner of the dealings with the supervisor and the runtimes."""

    def __init__(
        self,
        drain_timeout_s: float,
        epoch: int,
        fleet: Fleet,
        table: RequestTable,
        desk: RequestDesk,
        out: Outbox,
    ) -> None:
        self._drain_timeout_s = drain_timeout_s  # of a runtime that leaves
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

    def start(self, model: Model, device: Device, now: float, why: str, role: Role = Role.HOME) -> RuntimeId:
        self._num_started += 1
        runtime_id = RuntimeId(f"{model.name}@{device.name}.{self._epoch}-{self._num_started}")
        self._fleet.start(model, device, runtime_id, now, why, role)
        if role is Role.HOME:
            model.retry_at = math.inf
        self._out.supervisor(StartRuntime(runtime=runtime_id, model=model.name, device=device.name))
        return runtime_id

    def stop(self, runtime: Runtime, now: float, why: str) -> None:
        """End its process. It is charged until the supervisor says that it is gone."""
        assert runtime.id is not None
        self._fleet.move(runtime, STOPPING, now, why)
        self._out.supervisor(StopRuntime(runtime=runtime.id, reason=why))

    def wake(self, runtime: Runtime, now: float, why: str) -> None:
        device = self._fleet.devices[runtime.device or ""]
        needed_bytes = self._fleet.mapped_bytes(runtime.model) - runtime.charged_bytes
        assert needed_bytes <= device.free_bytes, "a wake needs its room first"
        self._fleet.move(runtime, WAKING, now, why)
        self._send_wake(runtime, now)

    def drain(self, runtime: Runtime, now: float, why: str, *, keep_weights: bool = False) -> None:
        """No more grants; it sleeps as soon as nothing is in flight, at once if nothing is.

        ``keep_weights`` where neighbours want the room: they take what they need of it (messages.Sleep).
        """
        runtime.keep_weights = keep_weights
        self._fleet.move(runtime, DRAINING, now, why)
        self._settle_drained(runtime, now)

    def retire(self, runtime: Runtime, now: float, why: str, *, keep: bool = False) -> None:
        """Not the home (any more): it answers what it has in flight, then it is stopped, or sleeps if it is kept."""
        self._fleet.set_leaving(runtime)
        runtime.keeps = keep
        if runtime.state is AWAKE:
            self._fleet.move(runtime, DRAINING, now, why)
        self._settle_drained(runtime, now)

    def give_way(self, runtime: Runtime, now: float, why: str) -> None:
        """Its memory is wanted by another: a home sleeps, any other is stopped."""
        if runtime.role is Role.HOME:
            self.drain(runtime, now, why, keep_weights=True)
        else:
            self.retire(runtime, now, why)

    def settle(self, model: Model, now: float) -> None:
        """Follow up what has come to its end at each of its runtimes."""
        for runtime in model.runtimes:
            self._settle_drained(runtime, now)

    def _settle_drained(self, runtime: Runtime, now: float) -> None:
        if runtime.role is Role.SPARE and runtime.state is AWAKE:
            self._fleet.move(runtime, DRAINING, now, "sleeps here to be woken when it is wanted here")
        if runtime.role is Role.LEAVING:
            self._settle_leaving(runtime, now)
        elif (
            runtime.state is DRAINING
            and runtime.sleep_sent_at is None
            and not self._table.running(runtime.id)
        ):
            self._send_sleep(runtime, now)

    def _settle_leaving(self, runtime: Runtime, now: float) -> None:
        if runtime.state is AWAKE:  # it would not sleep, or was found so
            self._fleet.move(runtime, DRAINING, now, "leaves")
        if runtime.state is STOPPING or (runtime.state is STARTING and runtime.adopted):
            return  # what an adopted one has in flight is known from its Hello only
        is_idle = runtime.sleep_sent_at is None and not self._table.running(runtime.id)
        if is_idle and runtime.keeps and runtime.state in (DRAINING, ASLEEP) and runtime.model.spare is None:
            self._fleet.set_role(runtime, Role.SPARE)
            runtime.keep_weights = True
            self._settle_drained(runtime, now)
        elif is_idle and (runtime.state is not DRAINING or now >= runtime.idle_since + _LAST_WORDS_S):
            self.stop(runtime, now, "leaves, nothing is in flight")

    def end_leavers(self, now: float) -> None:
        """Those that have nothing to do any more, and those past the deadline: then the memory counts for more than
        an answer that does not end."""
        for runtime in list(self._fleet.leaving.values()):
            self._settle_leaving(runtime, now)
            if (
                runtime.role is Role.LEAVING
                and runtime.state is DRAINING
                and now - runtime.since >= self._drain_timeout_s
            ):
                self.stop(runtime, now, f"still not drained after {self._drain_timeout_s:.0f} s")

    def call_off_drain(self, runtime: Runtime, now: float) -> None:
        """The room is no longer wanted. Only before Sleep was sent: that is answered first."""
        if runtime.state is DRAINING and runtime.sleep_sent_at is None:
            self._fleet.move(runtime, AWAKE, now, "its memory is no longer wanted")

    def _send_sleep(self, runtime: Runtime, now: float) -> None:
        assert runtime.id is not None
        runtime.sleep_sent_at = now
        self._out.runtime(runtime.id, Sleep(runtime=runtime.id, keep_weights=runtime.keep_weights))

    def _send_wake(self, runtime: Runtime, now: float) -> None:
        assert runtime.id is not None
        runtime.wake_sent_at = now
        self._out.runtime(runtime.id, Wake(runtime=runtime.id))

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
        for runtime_id in sorted(message.alive, key=_age):
            if self._fleet.by_id(runtime_id) is None and not self._fleet.has_exited(runtime_id):
                self._adopt(runtime_id, now)
        self._desk.lose_unlisted(now)
        return first

    def _adopt(self, runtime_id: RuntimeId, now: float) -> None:
        """The oldest runtime of a model is its home. A younger one is the target of a move that the earlier router
        had begun, which goes on: whichever of the two is awake first serves, and one is left in the end. More of
        them are replicas; how much the model is asked for is not known yet, so they end what they have and leave."""
        place = self._fleet.parse(runtime_id)
        if place is None or place[0].name in place[1].residents:
            reason = (
                "its model has a runtime there already" if place else "its model or device is not configured"
            )
            self._fleet.note(f"{runtime_id}: stopped ({reason})")
            self._out.supervisor(StopRuntime(runtime=runtime_id, reason=reason))
            return
        model, device = place
        role = Role.HOME if model.runtime.id is None else Role.INCOMING
        if role is Role.INCOMING and model.incoming is not None:
            role = Role.LEAVING
        self._fleet.adopt(model, device, runtime_id, now, role)
        self._ask_hello(runtime_id, now)

    def runtime_exited(self, message: RuntimeExited, now: float) -> None:
        runtime = self._fleet.by_id(message.runtime)
        if runtime is None:
            self._fleet.remember_exit(message.runtime)
            self._desk.lose(message.runtime, message.reason, now)
        else:
            self._exited(runtime, message.reason, now, expected=message.expected)

    def _exited(self, runtime: Runtime, reason: str, now: float, *, expected: bool) -> None:
        model, is_home = runtime.model, runtime is runtime.model.runtime
        assert runtime.id is not None
        if expected or runtime.state is STOPPING:
            if is_home:
                model.failure = ""
            self._fleet.exited(runtime, COLD, now, reason if expected else "stopped")
        elif not is_home or _heir(model) is not None:
            self._fleet.exited(runtime, FAILED, now, reason)
        elif runtime.known:
            self._back_off(runtime, now)
            wait_s = model.not_before - now
            self._fleet.exited(runtime, FAILED, now, f"{reason}; starts again in {wait_s:.0f} s")
            model.failure, model.start_wanted = "", True  # its queue is kept: it was well before
        else:
            self._failed_to_load(runtime, reason, now)
        if is_home and (heir := _heir(model)) is not None:
            self._fleet.make_home(heir, f"the runtime on {runtime.device} is gone: {reason}")
            self.call_off_drain(heir, now)
        self._desk.lose(runtime.id, reason, now)

    def _failed_to_load(self, runtime: Runtime, reason: str, now: float) -> None:
        model = runtime.model
        model.load_failures += 1
        model.failure, model.start_wanted = reason, False
        self._fleet.exited(runtime, FAILED, now, reason)
        if model.load_failures <= _AUTOMATIC_RETRIES:
            model.retry_at = now + min(_LONGEST_BACKOFF_S, 2.0 ** (model.load_failures - 1))
        text = f"{model.name} failed to load: {reason}"
        retry_s = max(1.0, min(model.retry_at, now + RETRY_FAILED_S) - now)
        self._desk.refuse_all(model, "model_failed", text, retry_s, now)

    def _back_off(self, runtime: Runtime, now: float) -> None:
        """1, 2, 4 .. 60 s, from the start again after a healthy minute."""
        model = runtime.model
        if now - runtime.ready_since >= _HEALTHY_S:
            model.crashes = 0
        model.not_before = now + min(_LONGEST_BACKOFF_S, 2.0**model.crashes)
        model.crashes = min(model.crashes + 1, 10)

    def forgive(self, model: Model) -> None:
        """An operator or a new request asks for a model that failed: try at once."""
        model.not_before, model.crashes = 0.0, 0
        model.load_failures, model.retry_at = 0, math.inf

    # ------------------------------------------------------------ the runtimes' word

    def find(self, message: RuntimeToRouter, now: float) -> Runtime | None:
        """The runtime that speaks. A stranger is asked for its Hello, and the supervisor for its list."""
        runtime = self._fleet.by_id(message.runtime)
        if runtime is not None:
            runtime.heard_at = now
            if not runtime.known and not isinstance(message, Hello):
                self._ask_hello(message.runtime, now)
            return runtime
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

    def hello(self, runtime: Runtime, message: Hello, now: float) -> None:
        model = runtime.model
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
            self._fleet.told(runtime, told, now)
        else:
            self._fleet.move(runtime, AWAKE, now, f"started in {message.start_s:.1f} s")
            model.last_start_s = message.start_s
        runtime.known, runtime.ready_since = True, now
        model.failure, model.start_wanted, model.load_failures, model.shortages = "", False, 0, 0
        self._asked_at.pop(message.runtime, None)

    def slept(self, runtime: Runtime, message: Slept, now: float) -> None:
        model = runtime.model
        if runtime.state is not DRAINING or runtime.sleep_sent_at is None:
            return  # said twice
        model.sleeps, model.last_sleep_s = model.sleeps + 1, message.seconds
        self._fleet.move(runtime, ASLEEP, now, f"{model.reason}; slept in {message.seconds:.3f} s")

    def sleep_refused(self, runtime: Runtime, message: SleepRefused, now: float) -> None:
        if runtime.state is DRAINING and runtime.sleep_sent_at is not None:
            self._fleet.move(runtime, AWAKE, now, f"would not sleep: {message.reason}")
            # It was not idle: not asked again at once, as one that never served would be.
            runtime.idle_since = runtime.awake_since = now
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
        if runtime is not model.runtime and message.shortage:
            self._fleet.move(runtime, ASLEEP, now, message.reason)
        elif runtime is not model.runtime:
            self.stop(runtime, now, f"could not wake: {message.reason}")
        elif message.shortage:
            wait_s = min(_LONGEST_WAKE_RETRY_S, _FIRST_WAKE_RETRY_S * 2.0**model.shortages)
            model.shortages = min(model.shortages + 1, 10)
            model.not_before = now + wait_s
            self._fleet.move(runtime, ASLEEP, now, f"{message.reason}; tried again in {wait_s:.1f} s")
        else:
            self._back_off(runtime, now)
            model.start_wanted = True
            self.stop(runtime, now, f"could not wake: {message.reason}")

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
        if runtime.state is AWAKE and told is ASLEEP:
            self._fleet.move(runtime, DRAINING, now, "says that it sleeps")
            self._fleet.move(runtime, ASLEEP, now, "says that it sleeps")
        elif runtime.state is ASLEEP and told is AWAKE:
            self._fleet.move(runtime, WAKING, now, "says that it is awake")
            self._fleet.move(runtime, AWAKE, now, "says that it is awake")
        elif runtime.state is DRAINING and told is AWAKE and _is_old(runtime.sleep_sent_at, now):
            self._send_sleep(runtime, now)
        elif runtime.state is DRAINING and told is ASLEEP and _is_old(runtime.sleep_sent_at, now):
            self._fleet.move(runtime, ASLEEP, now, "says that it sleeps")
        elif runtime.state is WAKING and told is AWAKE and _is_old(runtime.since, now):
            self._fleet.move(runtime, AWAKE, now, "says that it is awake")
        elif runtime.state is WAKING and told is ASLEEP and _is_old(runtime.wake_sent_at, now):
            self._send_wake(runtime, now)


def _is_old(since: float | None, now: float) -> bool:
    return since is not None and now - since >= _RESEND_S


def _heir(model: Model) -> Runtime | None:
    """Who is the model's home when that is gone: one that serves, then one that has hardly begun to leave, then one
    that sleeps, or comes."""

    def rank(runtime: Runtime) -> int | None:
        if runtime.serves:
            return 0
        if runtime.role is Role.LEAVING:
            may_stay = runtime.state is DRAINING and runtime.sleep_sent_at is None
            return 1 if may_stay or (runtime.adopted and runtime.state is STARTING) else None
        if runtime.state is STOPPING or runtime.sleep_sent_at is not None:
            return None
        return 2 if runtime.state is ASLEEP else 3

    ranked = [
        (at, number) for number, runtime in enumerate(model.others) if (at := rank(runtime)) is not None
    ]
    return model.others[min(ranked)[1]] if ranked else None


def _age(runtime: RuntimeId) -> tuple[int, int, str]:
    """Older ones first: ``<model>@<device>.<epoch>-<number>``."""
    epoch, _, number = runtime.rpartition(".")[2].partition("-")
    is_ours = epoch.isdecimal() and number.isdecimal()
    return (int(epoch), int(number), runtime) if is_ours else (0, 0, runtime)
