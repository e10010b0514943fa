"""What operators ask: sleep, wake, load, unload, pin, unpin, drain, move, explain. Each ask gets one reply.

All are idempotent. An operator's sleep is not a ban: the model wakes again on its next request.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from prism_sgl.messages import AdminReply, AskAdmin
from prism_sgl.schedulers.events import Outbox
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.lifecycle import Lifecycle
from prism_sgl.schedulers.moves import Mover
from prism_sgl.schedulers.records import (
    ASLEEP,
    AWAKE,
    COLD,
    DRAINING,
    FAILED,
    STARTING,
    STOPPING,
    WAKING,
    Model,
    Role,
)
from prism_sgl.schedulers.request_table import RequestTable

_MOST_ASKS = 64  # a model; more is a script gone wild


@dataclass(frozen=True)
class _Ask:
    api: str
    ask: str
    verb: str
    device: str


class AdminDesk:
    """Owner of the asks that wait for their end, by model."""

    def __init__(
        self, fleet: Fleet, table: RequestTable, lifecycle: Lifecycle, mover: Mover, out: Outbox
    ) -> None:
        self._fleet = fleet
        self._table = table
        self._lifecycle = lifecycle
        self._mover = mover
        self._out = out
        self._waiting: dict[str, list[_Ask]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def wants_awake(self, model: Model) -> bool:
        """An operator waits for it as a client would."""
        return any(ask.verb in ("wake", "load") for ask in self._waiting.get(model.name, ()))

    def ask(self, api: str, message: AskAdmin, now: float) -> None:
        ask = _Ask(api, message.ask, message.verb, message.device)
        model = self._fleet.models.get(message.model)
        if model is None:
            return self._reply(ask, 404, f"no model {message.model}")
        waiting = self._waiting.get(model.name, [])
        if ask in waiting:
            return None
        if len(waiting) >= _MOST_ASKS:
            return self._reply(ask, 429, f"{len(waiting)} asks wait for {model.name} already")
        match message.verb:
            case "pin" | "unpin":
                model.pinned = message.verb == "pin"
                self._fleet.touch(model)
                return self._reply(ask, 200, f"{model.name} is {message.verb}ned")
            case "sleep" | "drain":
                refusal = self._sleep(model, message.verb, now)
            case "wake" | "load":
                self._lifecycle.forgive(model)
                refusal = "is stopping" if model.runtime.state is STOPPING else None
                if model.runtime.state is DRAINING and model.runtime.preempt_at == math.inf:
                    # An operator's drain. One for a neighbour's turn goes on: it wakes in its own.
                    self._lifecycle.call_off_drain(
                        model.runtime, now, f"an operator asked for {message.verb}"
                    )
            case "unload":
                refusal = self._unload(model, now)
            case "move":
                refusal = self._move(model, message.device, now)
            case _:
                return self._reply(ask, 400, f"no verb {message.verb}")
        if refusal is not None:
            return self._reply(ask, 409, f"{model.name} {refusal}")
        self._waiting.setdefault(model.name, []).append(ask)
        self._fleet.touch(model)
        return None

    def answer(self, api: str, message: AskAdmin, text: Callable[[Model], str]) -> None:
        """An ask that only wants to know something."""
        ask = _Ask(api, message.ask, message.verb, message.device)
        if (model := self._fleet.models.get(message.model)) is None:
            self._reply(ask, 404, f"no model {message.model}")
        else:
            self._reply(ask, 200, text(model))

    def _sleep(self, model: Model, verb: str, now: float) -> str | None:
        state = model.runtime.state
        if model.pinned:
            return "is pinned; unpin it first"
        if state in (STARTING, WAKING, STOPPING):
            return f"is {state}"
        if state is not AWAKE:
            return None  # asleep, on its way there, or without a process: settled by its state
        if verb == "sleep" and (busy := self._busy(model)):
            return f"{busy}; drain it instead"
        self._retire_others(model, now, f"an operator asked for {verb}")
        self._lifecycle.drain(model.runtime, now, f"an operator asked for {verb}")
        return None

    def _unload(self, model: Model, now: float) -> str | None:
        model.start_wanted = False
        if model.runtime.state in (COLD, FAILED):
            self._lifecycle.forgive(model)
        elif model.runtime.state is not STOPPING:
            if busy := self._busy(model):
                return f"{busy}; drain it first"
            for runtime in list(model.others):
                self._lifecycle.retire(runtime, now, "an operator unloaded it")
            self._lifecycle.stop(model.runtime, now, "an operator unloaded it")
        return None

    def _move(self, model: Model, device: str, now: float) -> str | None:
        if device == model.runtime.device or device == self._mover.target(model):
            return None
        if model.pinned:
            return "is pinned; unpin it first"
        if (refusal := self._mover.refusal(model, device)) is not None:
            return refusal
        self._mover.begin(model, device, now, "an operator asked for it")
        return None

    def _retire_others(self, model: Model, now: float, why: str) -> None:
        for runtime in list(model.others):
            if runtime.role in (Role.INCOMING, Role.REPLICA):
                self._lifecycle.retire(runtime, now, why)

    def _busy(self, model: Model) -> str | None:
        running = sum(len(self._table.running(runtime.id)) for runtime in model.runtimes)
        queued = len(self._table.queued(model.name))
        return f"is busy ({running} running, {queued} queued)" if running or queued else None

    def settle(self, model: Model) -> None:
        """Reply to those asks whose end the model's state is."""
        if (waiting := self._waiting.get(model.name)) is None:
            return
        for ask in list(waiting):
            if (end := self._end(ask, model)) is not None:
                waiting.remove(ask)
                self._reply(ask, *end)
        if not waiting:
            del self._waiting[model.name]

    def _end(self, ask: _Ask, model: Model) -> tuple[int, str] | None:
        verb, state = ask.verb, model.runtime.state
        says = f"{model.name} is {state}" + (f" ({model.reason})" if model.reason else "")
        if verb in ("sleep", "drain"):
            if state in (ASLEEP, WAKING, COLD, FAILED):  # waking: for the next request, after it has slept
                return 200, says
            return (409, says) if state is AWAKE else None
        if verb == "move":
            if model.runtime.device == ask.device:
                return 200, f"{says}, on {ask.device}"
            if self._mover.target(model) == ask.device:
                return None
            why = self._mover.why_given_up(model)
            return 409, f"{says}; it did not move" + (f": {why}" if why else "")
        if verb == "unload":
            return (200, says) if state in (COLD, FAILED, STARTING) and not model.others else None
        if state is AWAKE or (state is ASLEEP and verb == "load"):
            return 200, says
        # A failure that is already tried again is not the end of this ask.
        return (503, says) if state is FAILED and model.load_failures > 0 else None

    def fail(self, model: Model, text: str) -> None:
        """It cannot be awake."""
        for ask in self._waiting.pop(model.name, []):
            self._reply(ask, 409, text)

    def forget_api(self, api: str) -> None:
        for name, waiting in list(self._waiting.items()):
            if rest := [ask for ask in waiting if ask.api != api]:
                self._waiting[name] = rest
            else:
                del self._waiting[name]

    def _reply(self, ask: _Ask, status: int, text: str) -> None:
        self._out.api(ask.api, AdminReply(ask=ask.ask, status=status, message=text))

    def check(self) -> None:
        for name, waiting in self._waiting.items():
            assert waiting, f"no empty list of asks: {name}"
            assert len(waiting) <= _MOST_ASKS
