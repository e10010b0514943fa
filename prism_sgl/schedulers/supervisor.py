"""The supervisor's side: what it says is alive, and what it says is gone."""

from __future__ import annotations

import math

from prism_sgl.messages import Introduce, RuntimeExited, RuntimeId, StopRuntime, SupervisorHello
from prism_sgl.schedulers.events import Outbox
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.lifecycle import LONGEST_BACKOFF_S, Lifecycle
from prism_sgl.schedulers.records import (
    ASLEEP,
    COLD,
    DRAINING,
    FAILED,
    STARTING,
    STOPPING,
    Model,
    Role,
    Runtime,
)
from prism_sgl.schedulers.requests import RETRY_FAILED_S, RequestDesk

_ASK_AGAIN_S = 1.0
_AUTOMATIC_RETRIES = 3


class SupervisorDesk:
    """Owner of whether the supervisor has spoken; brings the fleet up to date with what it says."""

    def __init__(
        self, epoch: int, fleet: Fleet, desk: RequestDesk, lifecycle: Lifecycle, out: Outbox
    ) -> None:
        self._epoch = epoch
        self._fleet = fleet
        self._desk = desk
        self._lifecycle = lifecycle
        self._out = out
        self._asked_at = -math.inf
        self.known = False  # until it has listed what is alive, nothing may be started

    def ask(self, now: float) -> None:
        if now - self._asked_at >= _ASK_AGAIN_S:
            self._asked_at = now
            self._out.supervisor(Introduce(epoch=self._epoch))

    def hello(self, message: SupervisorHello, now: float) -> bool:
        """True for the first one. Runtimes exist if the supervisor lists them or we had it start them: a Hello
        that a dead worker left in a socket must not bring it back to life. One that is missing from a later list
        was reported before it as exited, or was started after it: nothing to learn from that."""
        first, self.known = not self.known, True
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
        self._lifecycle.ask_hello(runtime_id, now)

    def exited(self, message: RuntimeExited, now: float) -> None:
        runtime = self._fleet.by_id(message.runtime)
        if runtime is None:
            self._fleet.remember_exit(message.runtime)
            self._desk.lose(message.runtime, message.reason, now)
        else:
            self._exited(runtime, message, now)

    def _exited(self, runtime: Runtime, message: RuntimeExited, now: float) -> None:
        model, is_home = runtime.model, runtime is runtime.model.runtime
        expected, reason = message.expected, message.whole_reason
        was_told = runtime.state is STOPPING
        assert runtime.id is not None
        if expected or was_told:
            if is_home:
                model.failure = ""
            self._fleet.exited(runtime, COLD, now, reason if expected else "stopped")
        elif not is_home or _heir(model) is not None:
            self._fleet.exited(runtime, FAILED, now, reason)
        elif runtime.known:
            self._lifecycle.back_off(runtime, now)
            wait_s = model.not_before - now
            self._fleet.exited(runtime, FAILED, now, f"{reason}; starts again in {wait_s:.0f} s")
            model.failure, model.start_wanted = "", True  # its queue is kept: it was well before
        else:
            self._failed_to_load(runtime, reason, now)
        if is_home and (heir := _heir(model, was_told=was_told)) is not None:
            self._fleet.make_home(heir, f"the runtime on {runtime.device} is gone: {reason}")
            self._lifecycle.call_off_drain(heir, now)
        self._desk.lose(runtime.id, message.reason, now)
        for sibling in model.siblings:
            if sibling.runtime.state not in (COLD, FAILED, STOPPING):
                self._lifecycle.stop(sibling.runtime, now, f"{model.name} is gone: {reason}")

    def _failed_to_load(self, runtime: Runtime, reason: str, now: float) -> None:
        model = runtime.model
        model.load_failures += 1
        model.failure, model.start_wanted = reason, False
        self._fleet.exited(runtime, FAILED, now, reason)
        if model.load_failures <= _AUTOMATIC_RETRIES:
            model.retry_at = now + min(LONGEST_BACKOFF_S, 2.0 ** (model.load_failures - 1))
        text = f"{model.name} failed to load: {reason}"
        retry_s = max(1.0, min(model.retry_at, now + RETRY_FAILED_S) - now)
        self._desk.refuse_all(model.lead, "model_failed", text, retry_s, now)


def _heir(model: Model, *, was_told: bool = False) -> Runtime | None:
    """Who is the model's home when that is gone: one that serves, then one that has hardly begun to leave, then one
    that sleeps, or comes. Where the home was told to end (``was_told``), who leaves was told too."""

    def rank(runtime: Runtime) -> int | None:
        if runtime.serves:
            return 0
        if runtime.role is Role.LEAVING:
            if was_told:
                return None
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
