"""The router's head: events in, commands out, no clock and no sockets.

The live router and the simulator drive the same Controller; only who supplies ``now`` (a monotonic clock in
seconds) and who carries out the commands differs. Its parts, each owner of one structure: ``Fleet`` (models,
runtimes, devices), ``RequestTable`` (requests), ``RequestDesk`` (api_servers), ``Granter`` (orders of dispatch),
``Lifecycle`` (commands to supervisor and runtimes), ``SupervisorDesk`` and ``RuntimeDesk`` (what those say),
``AdminDesk`` (operators' asks), ``Activation`` (who wants to be awake), ``RoomMaker`` (whose memory makes room),
``Mover`` (models on their way to another device), ``Balancer`` (which of them shall move), ``Bursts`` (where an idle
model is asked next).

What it needs of its peers: messages of one peer arrive in order (ZeroMQ gives that); an api_server answers
Introduce with ApiHello and submits again all that is not granted, ignores a Grant that it has obeyed, and answers
Abandon to a Grant of a request that it no longer has.
"""

from __future__ import annotations

import math

from prism_sgl.config import Config
from prism_sgl.messages import (
    Abandon,
    ApiBeat,
    ApiHello,
    ApiToRouter,
    AskAdmin,
    Finished,
    FirstToken,
    Hello,
    Load,
    RuntimeExited,
    RuntimeToRouter,
    SleepRefused,
    Slept,
    Started,
    Status,
    Submit,
    SupervisorHello,
    SupervisorToRouter,
    WakeFailed,
    Woke,
)
from prism_sgl.schedulers import status
from prism_sgl.schedulers.activation import Activation
from prism_sgl.schedulers.admin import AdminDesk
from prism_sgl.schedulers.balancer import Balancer
from prism_sgl.schedulers.bursts import Bursts
from prism_sgl.schedulers.events import (
    Command,
    Event,
    FromApi,
    FromRuntime,
    FromSupervisor,
    Outbox,
    Tick,
    ToApi,
    ToRuntime,
    ToSupervisor,
)
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.grants import Granter
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.moves import Mover
from prism_sgl.schedulers.request_table import RequestTable
from prism_sgl.schedulers.requests import RequestDesk
from prism_sgl.schedulers.room import RoomMaker
from prism_sgl.schedulers.runtimes import RuntimeDesk
from prism_sgl.schedulers.supervisor import SupervisorDesk

__all__ = [
    "Command",
    "Controller",
    "Event",
    "FromApi",
    "FromRuntime",
    "FromSupervisor",
    "Tick",
    "ToApi",
    "ToRuntime",
    "ToSupervisor",
]

_SWEEP_S = 1.0


class Controller:
    """Decides; whoever drives it carries out. One loop owns it, so it has no locks."""

    def __init__(self, config: Config, *, epoch: int) -> None:
        self.epoch = epoch
        self._out = Outbox()
        self._fleet = Fleet(config)
        self._table = RequestTable(config.server.activation_timeout_s)
        self._granter = Granter(config.scheduler, self._fleet, self._table, self._out)
        self._desk = RequestDesk(config, epoch, self._fleet, self._table, self._granter, self._out)
        drain_timeout_s = config.scheduler.move_drain_s
        self._lifecycle = Lifecycle(drain_timeout_s, epoch, self._fleet, self._table, self._out)
        self._supervisor = SupervisorDesk(epoch, self._fleet, self._desk, self._lifecycle, self._out)
        self._runtimes = RuntimeDesk(self._fleet, self._table, self._desk, self._lifecycle, self._supervisor)
        self._mover = Mover(config.scheduler, self._fleet, self._lifecycle)
        self._admin = AdminDesk(self._fleet, self._table, self._lifecycle, self._mover, self._out)
        self._rooms = RoomMaker(config.scheduler, self._fleet, self._table, self._lifecycle)
        self._activation = Activation(
            config,
            self._fleet,
            self._table,
            self._desk,
            self._lifecycle,
            self._supervisor,
            self._admin,
            self._mover,
            self._rooms,
        )
        self._bursts = Bursts(config.scheduler, self._fleet, self._table, self._mover)
        self._balancer = Balancer(
            config.scheduler, self._fleet, self._table, self._mover, self._activation.waited_for
        )
        self._sweep_at = -math.inf

    @property
    def num_moves(self) -> int:
        """Grows with each change of a state: when it has, the api_servers shall have a new Status."""
        return self._fleet.num_moves

    @property
    def apis(self) -> list[str]:
        """api_servers that have said hello: who shall have a Status."""
        return self._desk.apis

    def handle(self, event: Event, now: float) -> list[Command]:
        match event:
            case FromApi(api=api, message=message):
                self._from_api(api, message, now)
            case FromRuntime(message=message):
                self._from_runtime(message, now)
            case FromSupervisor(message=message):
                self._from_supervisor(message, now)
            case Tick():
                pass
        self._settle(now)
        return self._out.take()

    def next_tick(self, now: float) -> float | None:
        """Seconds until it must be called again though nothing happens; None if nothing is pending."""
        at = min(self._activation.next_at, self._granter.next_at)
        if self._supervisor.known:
            at = min(at, self._balancer.next_at)
        if self._table or self._admin or self._fleet.leaving or not self._supervisor.known:
            at = min(at, self._sweep_at)
        return None if at == math.inf else max(0.0, at - now)

    def status(self, now: float) -> Status:
        return status.build(self.epoch, self._fleet, self._table, self._activation, self._balancer, now)

    def check(self) -> None:
        """Assert every invariant."""
        self._fleet.check()
        self._table.check()
        self._admin.check()
        self._mover.check()
        if self._supervisor.known:
            self._activation.check()
        assert not self._fleet.changed, "every change is settled before the event is over"

    # ------------------------------------------------------------ events

    def _from_api(self, api: str, message: ApiToRouter, now: float) -> None:
        if isinstance(message, ApiHello):
            self._desk.hello(api, message, now, supervisor_known=self._supervisor.known)
            return
        known = self._desk.knows(api, now)
        match message:
            case Submit():
                if known:
                    self._desk.submit(api, message, now)
                    self._balancer.asked()
            case Abandon():
                self._desk.abandon(message, now)
            case AskAdmin(verb="explain"):
                self._admin.answer(api, message, lambda model: self._balancer.explain(model, now))
            case AskAdmin():
                self._admin.ask(api, message, now)
            case ApiBeat():
                pass

    def _from_runtime(self, message: RuntimeToRouter, now: float) -> None:
        runtime = self._runtimes.find(message, now)
        match message:
            case Started():
                self._desk.started(message, now)
            case FirstToken():
                self._desk.first_token(message, now)
            case Finished():
                self._desk.finished(message, now)
        if runtime is None:
            return
        match message:
            case Hello():
                self._runtimes.hello(runtime, message, now)
            case Slept():
                self._runtimes.slept(runtime, message, now)
            case SleepRefused():
                self._runtimes.sleep_refused(runtime, message, now)
            case Woke():
                self._runtimes.woke(runtime, message, now)
            case WakeFailed():
                self._runtimes.wake_failed(runtime, message, now)
            case Load():
                self._runtimes.load(runtime, message, now)
                self._rooms.kv_wanted(runtime, now)

    def _from_supervisor(self, message: SupervisorToRouter, now: float) -> None:
        match message:
            case SupervisorHello():
                if self._supervisor.hello(message, now):
                    self._activation.preload(now)
            case RuntimeExited():
                self._supervisor.exited(message, now)

    # ------------------------------------------------------------ after each event

    def _settle(self, now: float) -> None:
        """Follow up what the event changed until nothing changes any more, then grant."""
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_S
            if not self._supervisor.known:
                self._supervisor.ask(now)
            self._desk.sweep(now)
            self._lifecycle.end_leavers(now)
            for api in self._desk.forget_silent(now):
                self._admin.forget_api(api)
        if self._supervisor.known:
            self._balancer.run(now)
        while True:
            while self._fleet.changed:
                name = next(iter(self._fleet.changed))
                del self._fleet.changed[name]
                model = self._fleet.models[name]
                self._mover.settle(model, now)
                self._lifecycle.settle(model, now)
                self._admin.settle(model)
                self._bursts.settle(model, now)
                self._activation.consider(model, now)
                self._granter.changed(model)
                for runtime in model.runtimes:
                    if not runtime.serves:  # it may have given memory that a request waits for
                        self._granter.freed(runtime.device)
            self._activation.run(now)
            if self._fleet.changed:
                continue
            self._granter.run(now)
            self._rooms.make_kv_room(self._granter.take_shortages(), now)
            if not self._fleet.changed:
                break
