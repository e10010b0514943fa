"""What is asked of supervisor and runtimes: starts, stops, sleeps, wakes, and how long to wait after failures.

Answers come in at ``supervisor.SupervisorDesk`` and ``runtimes.RuntimeDesk``.
"""

from __future__ import annotations

import math

from prism_sgl.config import LAST_WORDS_S
from prism_sgl.messages import AskHello, RuntimeId, Sleep, StartRuntime, StopRuntime, Wake
from prism_sgl.schedulers.events import Outbox
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.records import (
    ASLEEP,
    AWAKE,
    DRAINING,
    STARTING,
    STOPPING,
    WAKING,
    Device,
    Model,
    Role,
    Runtime,
)
from prism_sgl.schedulers.request_table import RequestTable

_ASK_AGAIN_S = 1.0
_MOST_STRANGERS = 1024
LONGEST_BACKOFF_S = 60.0
_HEALTHY_S = 60.0
# A spare that would not sleep, since it still ends what its client has left, is asked again.
_REFUSED_S = 1.0


class Lifecycle:
    """Owner of the incarnations, and of when a stranger was asked for its Hello."""

    def __init__(
        self,
        drain_timeout_s: float,
        epoch: int,
        fleet: Fleet,
        table: RequestTable,
        out: Outbox,
    ) -> None:
        self._drain_timeout_s = drain_timeout_s  # of a runtime that leaves
        self._epoch = epoch
        self._fleet = fleet
        self._table = table
        self._out = out
        self._num_started = 0
        self._asked_at: dict[RuntimeId, float] = {}

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
        self.send_wake(runtime, now)

    def drain(
        self,
        runtime: Runtime,
        now: float,
        why: str,
        *,
        keep_weights: bool = False,
        preempt_at: float = math.inf,
    ) -> None:
        """No more grants; it sleeps as soon as nothing is in flight, at once if nothing is. So do its other parts.

        ``keep_weights`` where neighbours want the room: they take what they need of it (messages.Sleep).
        ``preempt_at``: from then on it sleeps with what is in flight, which goes on when it is awake again.
        """
        going = [each for each in runtime.together if each is runtime or each.state is AWAKE]
        for each in going:
            each.keep_weights = keep_weights
            self._fleet.move(each, DRAINING, now, why)
            each.preempt_at = preempt_at
        for each in going:
            self._settle_drained(each, now)

    def retire(self, runtime: Runtime, now: float, why: str, *, keep: bool = False) -> None:
        """Not the home (any more): it answers what it has in flight, then it is stopped, or sleeps if it is kept."""
        self._fleet.set_leaving(runtime)
        runtime.keeps = keep
        if runtime.state is AWAKE:
            self._fleet.move(runtime, DRAINING, now, why)
        self._settle_drained(runtime, now)

    def give_way(self, runtime: Runtime, now: float, why: str, *, preempt_at: float = math.inf) -> None:
        """Its memory is wanted by another: a home sleeps, any other is stopped."""
        if runtime.role is Role.HOME:
            self.drain(runtime, now, why, keep_weights=True, preempt_at=preempt_at)
        else:
            self.retire(runtime, now, why)
            if runtime.state is DRAINING:
                runtime.preempt_at = preempt_at  # for the account: its memory is on its way to who asked

    def is_set_aside(self, runtime: Runtime) -> bool:
        """It sleeps with requests that go on when it wakes."""
        is_asleep = any(each.state is ASLEEP for each in runtime.together)
        return is_asleep and bool(self._table.running(runtime.head.id))

    def takes_requests_along(self, runtime: Runtime) -> bool:
        """It is set aside, or will be as soon as it sleeps: only a home is woken for what it has."""
        was_told = runtime.sleep_sent_at is not None and bool(self._table.running(runtime.head.id))
        return was_told or self.is_set_aside(runtime)

    def settle(self, model: Model, now: float) -> None:
        """Follow up what has come to its end at each of its runtimes."""
        for runtime in model.runtimes:
            for each in runtime.together:
                self._settle_drained(each, now)

    def _settle_drained(self, runtime: Runtime, now: float) -> None:
        may_sleep = now >= runtime.refused_at + _REFUSED_S
        if runtime.role is Role.SPARE and runtime.state is AWAKE and may_sleep:
            runtime.keep_weights = True  # as long as nobody wants their room, a burst is served here at once
            self._fleet.move(runtime, DRAINING, now, "sleeps here to be woken when it is wanted here")
        if runtime.role is Role.LEAVING:
            self._settle_leaving(runtime, now)
        elif (
            runtime.state is DRAINING
            and runtime.sleep_sent_at is None
            and (now >= runtime.preempt_at or not self._table.running(runtime.head.id))
        ):
            self.send_sleep(runtime, now)

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
        elif is_idle and (runtime.state is not DRAINING or now >= runtime.idle_since + LAST_WORDS_S):
            self.stop(runtime, now, "leaves, nothing is in flight")

    def end_leavers(self, now: float) -> None:
        """Those that have nothing to do any more, and those past the deadline: then the memory counts for more than
        an answer that does not end. One that sleeps with requests is woken by nobody: they are tried elsewhere."""
        for runtime in list(self._fleet.leaving.values()):
            self._settle_leaving(runtime, now)
            if (
                runtime.role is Role.LEAVING
                and runtime.state in (DRAINING, ASLEEP)
                and now - runtime.since >= self._drain_timeout_s
            ):
                self.stop(runtime, now, f"still not drained after {self._drain_timeout_s:.0f} s")

    def call_off_drain(
        self, runtime: Runtime, now: float, why: str = "its memory is no longer wanted"
    ) -> None:
        """Only before Sleep was sent: that is answered first."""
        draining = [each for each in runtime.together if each.state is DRAINING]
        if all(each.sleep_sent_at is None for each in draining):
            for each in draining:
                self._fleet.move(each, AWAKE, now, why)

    def send_sleep(self, runtime: Runtime, now: float) -> None:
        assert runtime.id is not None
        runtime.sleep_sent_at = now
        sleep = Sleep(
            runtime=runtime.id, keep_weights=runtime.keep_weights, preempt=now >= runtime.preempt_at
        )
        self._out.runtime(runtime.id, sleep)

    def send_wake(self, runtime: Runtime, now: float) -> None:
        assert runtime.id is not None
        runtime.wake_sent_at = now
        self._out.runtime(runtime.id, Wake(runtime=runtime.id))

    def ask_hello(self, runtime: RuntimeId, now: float) -> None:
        if now - self._asked_at.get(runtime, -_ASK_AGAIN_S) >= _ASK_AGAIN_S:
            if len(self._asked_at) >= _MOST_STRANGERS:
                self._asked_at.clear()
            self._asked_at[runtime] = now
            self._out.runtime(runtime, AskHello(epoch=self._epoch))

    def heard_hello(self, runtime: RuntimeId) -> None:
        self._asked_at.pop(runtime, None)

    # ------------------------------------------------------------ after failures

    def back_off(self, runtime: Runtime, now: float) -> None:
        """1, 2, 4 .. 60 s, from the start again after a healthy minute."""
        model = runtime.model
        if now - runtime.ready_since >= _HEALTHY_S:
            model.crashes = 0
        model.not_before = now + min(LONGEST_BACKOFF_S, 2.0**model.crashes)
        model.crashes = min(model.crashes + 1, 10)

    def forgive(self, model: Model) -> None:
        """An operator or a new request asks for a model that failed: try at once."""
        model.not_before, model.crashes = 0.0, 0
        model.load_failures, model.retry_at = 0, math.inf
