"""What the controller knows of a request, a runtime, a model and a device, and which moves a runtime may make.

``fleet.Fleet`` alone changes runtimes and the charges of devices, ``request_table.RequestTable`` alone changes
requests; everybody else reads.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from prism_sgl.config import ModelConfig
from prism_sgl.messages import RequestId, RuntimeFacts, RuntimeId, RuntimeState
from prism_sgl.schedulers.latency import AnswerLength, LatencyEstimate, TokenRate
from prism_sgl.schedulers.load import LoadEstimate

COLD, STARTING, AWAKE = RuntimeState.COLD, RuntimeState.STARTING, RuntimeState.AWAKE
DRAINING, ASLEEP, WAKING = RuntimeState.DRAINING, RuntimeState.ASLEEP, RuntimeState.WAKING
STOPPING, FAILED = RuntimeState.STOPPING, RuntimeState.FAILED

# design.md's table, with three moves more: a drain may be called off (draining -> awake), a wake may find no
# memory (waking -> asleep), and an operator may end a start that hangs (starting -> stopping).
LEGAL_MOVES: dict[RuntimeState, frozenset[RuntimeState]] = {
    COLD: frozenset({STARTING, FAILED}),
    STARTING: frozenset({AWAKE, STOPPING, FAILED}),
    AWAKE: frozenset({DRAINING, STOPPING, FAILED}),
    DRAINING: frozenset({AWAKE, ASLEEP, STOPPING, FAILED}),
    ASLEEP: frozenset({WAKING, STOPPING, FAILED}),
    WAKING: frozenset({AWAKE, ASLEEP, STOPPING, FAILED}),
    STOPPING: frozenset({COLD, FAILED}),
    FAILED: frozenset({STARTING}),
}


class Role(enum.Enum):
    """What a runtime is to its model."""

    HOME = "home"  # takes grants; its state is what people call the model's state
    REPLICA = "replica"  # takes grants beside the home
    INCOMING = "incoming"  # target of a move: the home as soon as it is awake
    SPARE = "spare"  # sleeps on another device than the home, so that a move or a burst there takes no start
    LEAVING = "leaving"  # source of a move, or no longer needed: answers what it has, then it is stopped


_SERVING = frozenset({Role.HOME, Role.REPLICA})


class Phase(enum.IntEnum):
    """How far a request is. It only ever grows."""

    QUEUED = 0
    GRANTED = 1
    STARTED = 2
    ANSWERING = 3  # its first token is out
    OVER = 4


@dataclass(slots=True, eq=False)
class Request:
    """One try of a request. Times are of the router's clock; ``arrival`` is the client's, taken from its age."""

    id: RequestId
    api: str | None  # None: a runtime told of it, its api_server has not yet
    attempt: int
    model: str
    prompt_tokens: int
    max_new_tokens: int
    priority: int
    arrival: float
    deadline: float
    queued_at: float
    phase: Phase = Phase.QUEUED
    runtime: RuntimeId | None = None
    devices: tuple[str, ...] = ()  # of the runtime, and of the model's other parts
    since: float = 0.0  # of its phase
    kv_tokens: int = 0  # prompt and half of the expected answer: what it holds on average
    # From its grant on. Whole microseconds, so that sums over many do not drift.
    needed_us: int = 0  # its prefill, as estimated then
    tokens_us: int = 0  # of that, what its tokens take: all that it adds to a pass that runs anyway
    ahead_us: int = 0  # what its runtime had to prefill before it
    prefill_s: float | None = None  # measured, and not yet told to the model's estimate
    ttft_s: float = 0.0  # from when its runtime took it up
    is_aside: bool = False  # its runtime slept meanwhile: it fills no window, and its times tell nothing

    @property
    def waits_since(self) -> float:
        """For its time-out: a second try does not wait while the first one runs, and that may be for long."""
        return self.arrival if self.attempt == 1 else self.queued_at


@dataclass(slots=True, eq=False)
class Runtime:
    """A runtime of a model. That of the home is there without a process too, cold or failed."""

    model: Model
    role: Role = Role.HOME
    state: RuntimeState = COLD
    id: RuntimeId | None = None
    device: str | None = None
    charged_bytes: int = 0
    mapped: bool = False  # holds weights and KV, or may do so at any moment
    known: bool = False  # has said Hello to this controller
    adopted: bool = False  # started by an earlier router: its state is what its Hello says
    keeps: bool = False  # leaves to become the spare
    served: bool = False  # has ever been granted a request
    since: float = 0.0  # of this state
    awake_since: float = 0.0
    idle_since: float = 0.0  # last end of a request, or of the wake
    ready_since: float = math.inf
    heard_at: float = 0.0
    sleep_sent_at: float | None = None
    keep_weights: bool = False  # what its next Sleep says
    preempt_at: float = math.inf  # from then on its drain does not wait for what is in flight
    wake_sent_at: float | None = None
    wanted_since: float | None = None  # it takes more KV than it gets since then
    weights_bytes: int = 0
    kv_bytes: int = 0
    ceiling_bytes: int | None = None  # of its KV, as its Hello said
    refused_at: float = -math.inf  # when it would not sleep

    @property
    def most_kv_bytes(self) -> float:
        """What its device can give it; before its Hello what another runtime of the model has said of its own."""
        if self.ceiling_bytes is not None:
            return self.ceiling_bytes
        return math.inf if self.model.facts is None else self.model.facts.ceiling_bytes

    @property
    def serves(self) -> bool:
        """Takes grants now."""
        return self.state is AWAKE and self.role in _SERVING and self.model.is_whole

    @property
    def head(self) -> Runtime:
        """The one that has its requests: itself, or the home of the lead."""
        model = self.model
        return self if model.lead is model else model.lead.runtime

    @property
    def together(self) -> tuple[Runtime, ...]:
        """This one and those of the model's other parts."""
        return (self, *(sibling.runtime for sibling in self.model.siblings))

    @property
    def is_spare(self) -> bool:
        """Sleeps, and may be woken where it is."""
        return self.state is ASLEEP and self.role is Role.SPARE


@dataclass(slots=True, eq=False)
class Model:
    """One configured model, what was learned of it, and its runtimes.

    ``runtime`` is its home. ``others`` are on other devices and have a process, each with a role of its own.

    A model over several devices is one configured model for each of its parts, bound to its device: the ``lead`` has
    the requests of all, and what is learned of them; the others compute with it, hold as much, and are awake, asleep
    and wanted with it (activation.py, lifecycle.py). A part has a home only.
    """

    name: str
    config: ModelConfig
    pinned: bool
    devices: tuple[str, ...]
    runtime: Runtime = field(init=False)
    others: list[Runtime] = field(default_factory=list)
    facts: RuntimeFacts | None = None
    latency: LatencyEstimate = field(default_factory=LatencyEstimate)
    answers: AnswerLength = field(default_factory=AnswerLength)
    rate: TokenRate = field(default_factory=TokenRate)
    load: LoadEstimate = field(default_factory=LoadEstimate)
    lead: Model = field(init=False)  # itself, unless it is another part of one
    siblings: tuple[Model, ...] = ()  # the other parts
    reason: str = ""
    failure: str = ""  # why it cannot load; requests are refused while this is set and it is failed
    start_wanted: bool = False  # shall be up though no request waits: preload, restart
    not_before: float = 0.0  # back-off: no start or wake before
    retry_at: float = math.inf  # when a model that could not load is tried again by itself
    crashes: int = 0
    load_failures: int = 0
    shortages: int = 0
    activating_since: float = 0.0
    wakes: int = 0
    sleeps: int = 0
    starts: int = 0
    moves: int = 0
    last_wake_s: float = 0.0
    last_sleep_s: float = 0.0
    last_start_s: float = 0.0

    def __post_init__(self) -> None:
        self.runtime = Runtime(self)
        self.lead = self

    @property
    def parts(self) -> tuple[Model, ...]:
        return (self, *self.siblings)

    @property
    def is_whole(self) -> bool:
        """It takes requests itself, and all other parts of it are awake."""
        return self.lead is self and all(sibling.runtime.state is AWAKE for sibling in self.siblings)

    @property
    def runtimes(self) -> list[Runtime]:
        return [self.runtime, *self.others]

    @property
    def incoming(self) -> Runtime | None:
        return next((runtime for runtime in self.others if runtime.role is Role.INCOMING), None)

    @property
    def spare(self) -> Runtime | None:
        return next((runtime for runtime in self.others if runtime.role is Role.SPARE), None)

    @property
    def serving(self) -> list[Runtime]:
        """The runtimes that take grants now."""
        if not self.others:
            return [self.runtime] if self.runtime.serves else []
        return [runtime for runtime in self.runtimes if runtime.serves]


@dataclass(slots=True, eq=False)
class Device:
    name: str
    budget_bytes: int
    charged_bytes: int = 0
    residents: dict[str, Runtime] = field(default_factory=dict)  # by model
    wanted_kv_bytes: int = 0  # what those in flight may take beyond floors, as of the last look at grants

    @property
    def free_bytes(self) -> int:
        """Negative if facts turned out larger than the estimates that a start went by."""
        return self.budget_bytes - self.charged_bytes
