"""All models, runtimes and devices, and the account of their memory.

Memory here is an account of promises: a runtime that is mapped is charged its weights, its floor of KV and its
overhead, whatever it holds at the moment (the ledger knows that). Room that is promised to nobody is what a start
or a wake may take, so that no two models are woken into the same bytes.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from prism_sgl.config import Config
from prism_sgl.config_checks import allowed_devices, least_bytes
from prism_sgl.errors import IllegalMoveError
from prism_sgl.messages import RuntimeFacts, RuntimeId, RuntimeState
from prism_sgl.schedulers.latency import TokenRate
from prism_sgl.schedulers.load import LoadEstimate
from prism_sgl.schedulers.records import (
    ASLEEP,
    AWAKE,
    COLD,
    DRAINING,
    FAILED,
    LEGAL_MOVES,
    STARTING,
    STOPPING,
    WAKING,
    Device,
    Model,
    Role,
    Runtime,
)

_MAPPED = frozenset({STARTING, AWAKE, DRAINING, WAKING})
_NO_PROCESS = frozenset({COLD, FAILED})

# A dead runtime's last messages may come after the news of its death; ids are never used again.
_REMEMBERED_EXITS = 1024
_REMEMBERED_EVENTS = 50


class Fleet:
    """Owner of all models, runtimes and devices.

    Invariants: a runtime has an id and a device exactly while it may have a process; the charge of a device is
    the sum of its residents' charges; every state was reached by legal moves, except that of an adopted runtime,
    which its Hello tells. A model has one home, one incoming runtime at most, and never two runtimes on a device;
    what is not its home has a process. Each part of a model over several devices has a home only.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.devices = {d.name: Device(d.name, d.memory_bytes) for d in config.devices}
        self.models = {
            name: Model(name, m, m.pin, tuple(d.name for d in allowed_devices(config, m)))
            for name, m in config.models.items()
        }
        for model in self.models.values():
            model.rate = TokenRate(config.scheduler.window_s)
            model.load = LoadEstimate(config.scheduler.window_s)
        self._join_parts()
        self.linked = self._linked()
        self._by_id: dict[RuntimeId, Runtime] = {}
        self._exited: OrderedDict[RuntimeId, None] = OrderedDict()
        self.events: deque[str] = deque(maxlen=_REMEMBERED_EVENTS)
        self.leaving: dict[RuntimeId, Runtime] = {}
        self.changed: dict[str, None] = {}  # models to be looked at again, in order
        self.num_moves = 0
        self.num_starting = 0

    def _join_parts(self) -> None:
        for name in {model.config.part_of: None for model in self.models.values() if model.config.part_of}:
            lead = self.models[name]
            parts = [lead, *(m for m in self.models.values() if m.config.part_of == name)]
            devices = {device for part in parts for device in part.devices}
            assert len(devices) == len(parts) == sum(len(part.devices) for part in parts), "one device a part"
            for part in parts:
                part.lead, part.siblings = lead, tuple(p for p in parts if p is not part)
                part.latency, part.answers = lead.latency, lead.answers
                part.rate, part.load = lead.rate, lead.load

    def _linked(self) -> dict[str, tuple[str, ...]]:
        """Of each device, itself and those that share a model of several parts with it."""
        linked = {name: {name: None} for name in self.devices}
        for model in self.models.values():
            for sibling in model.siblings:
                linked[model.devices[0]][sibling.devices[0]] = None
        return {name: tuple(others) for name, others in linked.items()}

    # ------------------------------------------------------------ reading

    def by_id(self, runtime: RuntimeId | None) -> Runtime | None:
        return None if runtime is None else self._by_id.get(runtime)

    def has_exited(self, runtime: RuntimeId) -> bool:
        return runtime in self._exited

    def parse(self, runtime: RuntimeId) -> tuple[Model, Device] | None:
        """Model and device of an id ``<model>@<device>.<incarnation>``, if both are configured."""
        name, _, rest = runtime.partition("@")
        model = self.models.get(name)
        device = self.devices.get(rest.rpartition(".")[0])
        return None if model is None or device is None else (model, device)

    def mapped_bytes(self, model: Model) -> int:
        """Weights + floor of KV + overhead: from the engine's facts, before its first Hello from the files."""
        if (facts := model.facts) is not None:
            return facts.weights_bytes + facts.floor_bytes + facts.overhead_bytes
        return least_bytes(self._config, model.config)

    def asleep_bytes(self, model: Model) -> int:
        facts = model.facts
        return 0 if facts is None else facts.overhead_bytes - facts.awake_overhead_bytes

    def weights_bytes(self, model: Model) -> int:
        return model.facts.weights_bytes if model.facts is not None else model.config.weights_bytes

    # ------------------------------------------------------------ moves between states

    def touch(self, model: Model) -> None:
        """Something that others decide by has changed: look at this model before the event is over."""
        self.changed[model.name] = None

    def note(self, line: str) -> None:
        self.events.append(line)

    def move(self, runtime: Runtime, state: RuntimeState, now: float, why: str) -> None:
        if state not in LEGAL_MOVES[runtime.state]:
            name = runtime.id or runtime.model.name
            raise IllegalMoveError(f"{name} cannot go from {runtime.state} to {state}")
        self._enter(runtime, state, now, why)

    def start(
        self, model: Model, device: Device, runtime_id: RuntimeId, now: float, why: str, role: Role
    ) -> None:
        """A process is about to be started for it."""
        assert self.mapped_bytes(model) <= device.free_bytes, "a start needs its room first"
        runtime = self._place(model, device, runtime_id, role)
        self.move(runtime, STARTING, now, why)
        model.starts += 1

    def adopt(self, model: Model, device: Device, runtime_id: RuntimeId, now: float, role: Role) -> None:
        """A process of an earlier router: starting for all that we know, until its Hello tells more."""
        runtime = self._place(model, device, runtime_id, role)
        runtime.adopted = True
        self.move(runtime, STARTING, now, "was there before this router")

    def told(self, runtime: Runtime, state: RuntimeState, now: float) -> None:
        """An adopted runtime says what it is. Not a move: it was there all the time."""
        assert runtime.adopted
        assert not runtime.known
        runtime.served = True  # it may have; better to keep it a while than to send it to sleep at once
        self._enter(runtime, state, now, "told a new router")

    def learn(self, model: Model, facts: RuntimeFacts) -> None:
        model.facts = facts
        for runtime in model.runtimes:
            self._charge(runtime)

    def exited(self, runtime: Runtime, state: RuntimeState, now: float, why: str) -> None:
        """Its process is gone: COLD if that was wanted, else FAILED."""
        model = runtime.model
        assert runtime.id is not None
        assert runtime.device is not None
        if state is COLD and runtime.state is not STOPPING:
            self.move(runtime, STOPPING, now, why)
        self.move(runtime, state, now, why)
        del self._by_id[runtime.id]
        self.leaving.pop(runtime.id, None)
        del self.devices[runtime.device].residents[model.name]
        self.remember_exit(runtime.id)
        if runtime is model.runtime:
            model.runtime = Runtime(model, state=runtime.state, since=now, idle_since=now)
        else:
            model.others.remove(runtime)

    def remember_exit(self, runtime: RuntimeId) -> None:
        self._exited[runtime] = None
        while len(self._exited) > _REMEMBERED_EXITS:
            self._exited.popitem(last=False)

    # ------------------------------------------------------------ roles

    def make_home(self, runtime: Runtime, why: str) -> None:
        """The model's home from now on. The old one, if it has a process, is leaving."""
        model, old = runtime.model, runtime.model.runtime
        assert runtime in model.others
        model.others.remove(runtime)
        model.runtime, runtime.role = runtime, Role.HOME
        self.leaving.pop(runtime.id or RuntimeId(""), None)
        if old.id is not None:
            model.others.append(old)
            self.set_leaving(old)
        model.reason = why
        self.num_moves += 1
        self.touch(model)
        self.note(f"{model.name}: home is {runtime.device} ({why})")

    def set_leaving(self, runtime: Runtime) -> None:
        """It takes no more grants, and will be stopped or become the spare."""
        assert runtime in runtime.model.others, "a home is never without its model"
        assert runtime.id is not None
        runtime.role = Role.LEAVING
        self.leaving[runtime.id] = runtime
        self.touch(runtime.model)

    def set_role(self, runtime: Runtime, role: Role) -> None:
        """A spare is woken to be the target of a move, or the source of one has been drained and is kept."""
        assert runtime in runtime.model.others
        assert role is not Role.HOME
        assert runtime.id is not None
        self.leaving.pop(runtime.id, None)
        runtime.role = role
        self.touch(runtime.model)

    def swap_home(self, spare: Runtime, why: str) -> None:
        """The model shall wake where its spare is; its home, idle or asleep, becomes the spare."""
        home = spare.model.runtime
        assert home.state in (ASLEEP, AWAKE), "one that comes or leaves has a role of its own"
        assert spare.role is Role.SPARE
        self.make_home(spare, why)
        self.set_role(home, Role.SPARE)

    # ------------------------------------------------------------

    def _place(self, model: Model, device: Device, runtime_id: RuntimeId, role: Role) -> Runtime:
        assert model.name not in device.residents, "a model has one runtime at most on a device"
        if role is Role.HOME:
            assert model.runtime.state in _NO_PROCESS, "a model has one home"
            runtime = Runtime(model, state=model.runtime.state, id=runtime_id, device=device.name)
            model.runtime = runtime
        else:
            runtime = Runtime(model, role, id=runtime_id, device=device.name)
            model.others.append(runtime)
        if role is Role.LEAVING:
            self.leaving[runtime_id] = runtime
        device.residents[model.name] = runtime
        self._by_id[runtime_id] = runtime
        return runtime

    def _enter(self, runtime: Runtime, state: RuntimeState, now: float, why: str) -> None:
        model, old = runtime.model, runtime.state
        self.num_starting += (state is STARTING) - (old is STARTING)
        self.num_moves += 1
        runtime.state, runtime.since = state, now
        runtime.sleep_sent_at = runtime.wake_sent_at = None
        runtime.preempt_at = math.inf
        if state in _MAPPED:
            runtime.mapped = True
        elif state is not STOPPING:  # a runtime that stops holds what it held until it has exited
            runtime.mapped = False
        if state is AWAKE and old is not DRAINING:
            runtime.awake_since = runtime.idle_since = now
        subject = model.name
        if runtime.role is Role.HOME:
            model.reason = why
            if state in (STARTING, WAKING):
                model.activating_since = now
        else:
            subject = f"{model.name} ({runtime.role.value} on {runtime.device})"
        self._charge(runtime)
        self.touch(model)
        self.note(f"{subject}: {state} ({why})" if why else f"{subject}: {state}")

    def _charge(self, runtime: Runtime) -> None:
        if runtime.device is None:
            return
        charge = 0
        if runtime.state not in _NO_PROCESS:
            model = runtime.model
            charge = self.mapped_bytes(model) if runtime.mapped else self.asleep_bytes(model)
        self.devices[runtime.device].charged_bytes += charge - runtime.charged_bytes
        runtime.charged_bytes = charge

    def check(self) -> None:
        for runtime_id, runtime in self._by_id.items():
            assert runtime.id == runtime_id
            assert runtime in runtime.model.runtimes
        for model in self.models.values():
            for runtime in model.runtimes:
                assert runtime.model is model
                assert (runtime.role is Role.HOME) == (runtime is model.runtime)
                assert (runtime.id is None) == (runtime.state in _NO_PROCESS) == (runtime.device is None)
                assert runtime.id is None or self._by_id[runtime.id] is runtime
                assert runtime.sleep_sent_at is None or runtime.state is DRAINING
                assert runtime.wake_sent_at is None or runtime.state is WAKING
            assert all(runtime.id is not None for runtime in model.others)
            for role in (Role.INCOMING, Role.SPARE):
                assert sum(runtime.role is role for runtime in model.others) <= 1
            devices = [runtime.device for runtime in model.runtimes if runtime.device is not None]
            assert len(devices) == len(set(devices)), f"{model.name} is twice on a device"
            assert not (model.siblings and model.others), "a part stays on its device"
        assert self.leaving == {i: r for i, r in self._by_id.items() if r.role is Role.LEAVING}
        for device in self.devices.values():
            charges = {name: runtime.charged_bytes for name, runtime in device.residents.items()}
            assert sum(charges.values()) == device.charged_bytes
            assert all(r.device == device.name and r.model.name == n for n, r in device.residents.items())
        assert self.num_starting == sum(r.state is STARTING for r in self._by_id.values())
