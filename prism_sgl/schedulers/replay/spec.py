"""What a replay is given: models and their costs, devices, arrivals. Plain values; loaders live in launch/replay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelCosts:
    """What one model costs on one device, or on each of its ``tp`` devices.

    Seconds of work are those of a device that nobody else uses; ``latency_s`` is spent outside the device (HTTP,
    tokenizer, detokenizer), so requests pass it side by side.
    """

    weights_bytes: int
    overhead_bytes: int  # awake: context, graphs, workspaces
    asleep_bytes: int  # what of it stays while asleep
    kv_bytes_per_token: int
    page_bytes: int
    floor_bytes: int  # KV that is held while awake: one request of full length
    context_tokens: int
    latency_s: float
    pass_s: float  # a prefill pass of nearly no tokens
    prefill_s_per_token: float
    step_s: float  # a decode step of one request without context
    step_s_per_request: float
    step_s_per_token: float  # for each token of context in the batch
    wake_s: float
    sleep_s: float
    start_s: float
    map_s_per_page: float
    wake_in_place_s: float = 0.0  # a wake that finds all its weights where they were: no wake takes less
    max_running: int = 128
    pass_tokens: int = 8192  # SGLang's chunked_prefill_size on an 80 GB card

    @property
    def page_tokens(self) -> int:
        return max(1, self.page_bytes // self.kv_bytes_per_token)

    @property
    def awake_bytes(self) -> int:
        """What it takes to be awake at all."""
        return self.weights_bytes + self.overhead_bytes + self.floor_bytes

    def decode_s(self, batch: int, live_tokens: float) -> float:
        return self.step_s + self.step_s_per_request * batch + self.step_s_per_token * live_tokens


@dataclass(frozen=True)
class Slo:
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class ModelSpec:
    name: str
    costs: ModelCosts
    trace_model: int
    trace_shift_s: float = 0.0
    tp: int = 1
    slo: Slo = Slo(2.0, 0.1)


@dataclass(frozen=True)
class Fleet:
    """Models that share ``num_devices`` devices of one size."""

    name: str
    models: tuple[ModelSpec, ...]
    num_devices: int
    device_bytes: int
    copy_slowdown: float = 0.96  # of engines on a device whose link a wake is using
    notes: tuple[str, ...] = ()  # costs that nobody measured, by name

    def by_name(self) -> dict[str, ModelSpec]:
        return {model.name: model for model in self.models}


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    model: str
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True, eq=False)
class Outcome:
    """A request as its client saw it. No end: it was not answered while the replay ran."""

    model: str
    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    first_at: float | None = None
    ended_at: float | None = None
    failure: str = ""


@dataclass(slots=True, eq=False)
class Move:
    """A model on its way to another device: from the wake of the target until the source has drained."""

    model: str
    began_at: float
    ended_at: float = math.inf


@dataclass
class Replayed:
    """What one policy made of one trace."""

    outcomes: list[Outcome]
    migrations: int = 0
    wakes: int = 0
    gpu_busy: float = 0.0
    log: str = ""  # digest of all that happened, in order
    placement: dict[str, list[str]] = field(default_factory=dict)  # at the end: device -> models awake there
    notes: tuple[str, ...] = ()
    moves: list[Move] = field(default_factory=list)  # those whose times are known


def span_s(arrivals: Sequence[Arrival]) -> float:
    return arrivals[-1].at_s - arrivals[0].at_s if arrivals else 0.0
