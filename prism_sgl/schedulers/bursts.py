"""Where the next burst of an idle model is served: at home, or on the device where its spare sleeps.

Each engine that computes on a device gets an equal part of its time, so what a burst finds there is told by how many
others compute at that moment: a prefill takes 1 + n times as long beside n of them, and so does each step after it. A
model that has nothing in flight loses nothing by changing devices, and its spare has its weights in place as long as no
neighbour took their room. So it is decided anew at the first request of each burst, and never during one: a batch that
is parted over two devices reads the weights twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_sgl.config import SchedulerConfig
from prism_sgl.schedulers.fleet import Fleet
from prism_sgl.schedulers.moves import Mover
from prism_sgl.schedulers.records import AWAKE, Device, Model, Role, Runtime
from prism_sgl.schedulers.request_table import RequestTable

# A wake that finds the weights in place, and the copy of what is missing (wake.json, two runs: 14 and 18 ms for an 8B,
# 5 and 8 for a 1B; 50.5 and 50.7 GB/s).
_WAKE_S = 0.010
_LINK_BYTES_PER_S = 50e9
# Of the time that is left for the first token, the part that it may take beside others and behind a wake: more requests
# of the burst stand behind it.
_OF_TIME_LEFT = 0.75
# Of a device: as much stays free for KV, or the burst would press those whom it joins.
_KV_ROOM = 0.10


@dataclass(frozen=True, slots=True)
class Option:
    """A device, for a burst that begins now."""

    device: str
    num_beside: int  # other models that compute there
    first_s: float  # until the first token


def better(home: Option, spare: Option, left_s: float) -> str | None:
    """Why the burst is served where the spare is; None if it stays. ``left_s`` is left for its first token.

    It must find fewer models there, so that all of the burst gains, and the first request must not pay for that: it
    comes in its time there too, or at least no later than at home.
    """
    if spare.num_beside >= home.num_beside:
        return None
    if spare.first_s > max(left_s * _OF_TIME_LEFT, home.first_s):
        return None
    return (
        f"idle, and its next burst finds {spare.num_beside} models computing on {spare.device} instead of "
        f"{home.num_beside} on {home.device}: first token in {spare.first_s * 1e3:.0f} ms"
    )


class Bursts:
    """Gives an idle model the better of its two devices when a request comes."""

    def __init__(self, limits: SchedulerConfig, fleet: Fleet, table: RequestTable, mover: Mover) -> None:
        self._limits = limits
        self._fleet = fleet
        self._table = table
        self._mover = mover

    def settle(self, model: Model, now: float) -> None:
        """Before the model's queue is looked at. Its home sleeps then, and Activation wakes the new one at once."""
        if not model.others or not (queued := self._table.queued(model.name)):
            return
        home, spare = model.runtime, model.spare
        if spare is None or not spare.is_spare or not self._may_leave(model, now):
            return
        source, target = self._fleet.devices[home.device or ""], self._fleet.devices[spare.device or ""]
        left_bytes = target.free_bytes + spare.charged_bytes - self._fleet.mapped_bytes(model)
        if left_bytes < _KV_ROOM * target.budget_bytes:
            return
        first = min(queued.values(), key=lambda request: request.deadline)
        here = self._option(model, source, model.latency.estimate_s(first.prompt_tokens), 0.0)
        # Its prefix cache stays behind.
        prefill_s = model.latency.uncached_s(first.prompt_tokens)
        there = self._option(model, target, prefill_s, self._wake_s(spare))
        if (why := better(here, there, first.deadline - now)) is not None:
            self._fleet.swap_home(spare, why)

    def _may_leave(self, model: Model, now: float) -> bool:
        home = model.runtime
        return (
            home.state is AWAKE
            and not model.pinned
            and len(model.others) == 1
            and not self._table.running(home.id)
            and now >= home.awake_since + self._limits.min_residence_s
            and not self._mover.rests_until(model, now)
            and self._mover.target(model) is None
        )

    def _option(self, model: Model, device: Device, prefill_s: float, wake_s: float) -> Option:
        num_beside = sum(
            bool(self._table.running(r.id) or (r.role is Role.HOME and self._table.queued(r.model.name)))
            for r in device.residents.values()
            if r.model is not model
        )
        return Option(device.name, num_beside, wake_s + prefill_s * (1 + num_beside))

    def _wake_s(self, spare: Runtime) -> float:
        taken_bytes = self._fleet.weights_bytes(spare.model) - spare.weights_bytes
        return _WAKE_S + max(0, taken_bytes) / _LINK_BYTES_PER_S
