"""Every message that crosses a process border, one union for each direction.

Frames are ``[msgpack struct]`` or ``[msgpack struct, raw bytes]``: bodies and chunks travel in a frame of
their own, so that no process copies them into a struct. No message holds an address or a file descriptor,
and no absolute clock: times are ages or durations in seconds, so that the peer may be another host.
New fields come last, with defaults.
"""

from __future__ import annotations

import enum
from typing import NewType

import msgspec

RequestId = NewType("RequestId", str)
RuntimeId = NewType("RuntimeId", str)  # "<model>@<device>.<incarnation>"


class RuntimeState(enum.StrEnum):
    """States of a runtime; the table of legal moves stands in ``schedulers/records.py``."""

    COLD = "cold"
    STARTING = "starting"
    AWAKE = "awake"
    DRAINING = "draining"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Base of all messages: frozen, tagged by class name."""


class RequestKey(msgspec.Struct, frozen=True):
    """One try of a request. A request is tried at most twice (attempt 1 and 2)."""

    request: RequestId
    attempt: int


class Due(msgspec.Struct, frozen=True, kw_only=True):
    """By when the first token of a granted request is promised, and how the router orders it."""

    in_s: float  # from when this is sent; negative: it is late
    waited_s: float  # since the client's request arrived
    priority: int  # the user's, the tier's and the model's together; bigger is sooner
    needed_s: float  # its prefill, as the router has learned it of the model


class RuntimeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What only the loaded engine knows. Bytes are whole granules."""

    weights_bytes: int
    overhead_bytes: int
    kv_bytes_per_token: int
    max_request_tokens: int  # the longest prompt + answer that can ever be held
    floor_bytes: int
    ceiling_bytes: int
    max_running_requests: int
    block_tokens: int
    awake_overhead_bytes: int = 0  # the part of ``overhead_bytes`` that sleep gives back


class RuntimeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker process needs to serve one model on one device (supervisor -> standby -> worker)."""

    runtime: RuntimeId
    model: str
    path: str
    device: str
    device_kind: str  # "host" | "cuda"
    device_index: int
    ledger_path: str
    run_dir: str  # private (0700); names of sockets derive from it, see prism_sgl/addresses.py
    floor_bytes: int  # 0: one request of full length
    ceiling_bytes: int  # 0: the whole budget
    priority: int
    kv_share: float = 1.0  # of what busy runtimes borrow
    block_tokens: int
    kv_page_bytes: int
    weights_page_bytes: int
    engine_args: dict[str, object]
    env: dict[str, str]
    log_path: str
    log_level: str = "info"
    weights_bytes: int = 0  # of its files: what the engine will take while it loads


# ---------------------------------------------------------------- api_server -> router


class Submit(Message, frozen=True):
    """A request waits at an api_server. Its body stays there; this is metadata only."""

    request: RequestId
    attempt: int
    model: str  # configured name, aliases already resolved
    prompt_tokens: int  # estimated from bytes
    max_new_tokens: int
    stream: bool
    priority: int = 0  # bigger is sooner
    ttft_s: float | None = None  # None: the model's default
    tpot_s: float | None = None
    waited_s: float = 0.0  # since the client's request arrived
    service_tier: str = ""  # OpenAI's: a key of schedulers/dispatch.py's TIERS


class Abandon(Message, frozen=True):
    """The client has gone (or its request ended at the api_server): forget it, wherever it is."""

    request: RequestId


class AskAdmin(Message, frozen=True):
    """An operator's wish. Answered by one AdminReply once it is carried out or refused."""

    ask: str  # echoed in the reply
    verb: str  # "sleep" | "wake" | "load" | "unload" | "pin" | "unpin" | "drain" | "move" | "explain"
    model: str
    device: str = ""  # where to move


class ApiHello(Message, frozen=True):
    """An api_server introduces itself, at start and after a router restart.

    ``granted`` are the requests it is forwarding right now, so that the router counts them as in flight.
    """

    api: str
    granted: list[tuple[RequestKey, RuntimeId]] = []


class ApiBeat(Message, frozen=True):
    """An api_server is alive; a router that does not know it answers ``Introduce``."""

    api: str


ApiToRouter = Submit | Abandon | AskAdmin | ApiHello | ApiBeat


# ---------------------------------------------------------------- router -> api_server


class Introduce(Message, frozen=True):
    """The router does not know you (it restarted): say hello, then submit again all that is not granted."""

    epoch: int


class Grant(Message, frozen=True):
    """Send the body of this request to that runtime now."""

    request: RequestId
    attempt: int
    runtime: RuntimeId
    queued_s: float = 0.0
    activation_s: float = 0.0  # of queued_s, the time in which the model started or woke
    due: Due | None = None


class Refuse(Message, frozen=True):
    """Answer the client with this error."""

    request: RequestId
    status: int
    code: str
    message: str
    retry_after_s: float | None = None


class Lost(Message, frozen=True):
    """The runtime of this granted request is gone. Submit again if no byte was sent, else an error."""

    request: RequestId
    attempt: int
    reason: str


class AdminReply(Message, frozen=True):
    """The end of an AskAdmin."""

    ask: str
    status: int
    message: str


class RuntimeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime that a model has beside its home, while it moves or has replicas."""

    runtime: RuntimeId
    device: str
    state: RuntimeState
    role: str  # "replica" | "incoming" | "spare" | "leaving"


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One configured model as the router sees it."""

    name: str
    state: RuntimeState
    device: str | None
    runtime: RuntimeId | None
    queued: int
    in_flight: int
    weights_bytes: int
    kv_bytes: int
    pinned: bool
    reason: str = ""  # why it failed, or why it is in this state
    wakes: int = 0
    sleeps: int = 0
    starts: int = 0
    last_wake_s: float = 0.0
    last_sleep_s: float = 0.0
    slack_s: float | None = (
        None  # of the queued request that has least; negative: it is late. None: none waits
    )
    late: int = 0  # queued requests that are late even if they ran at once
    prefill_alpha_s: float = 0.0  # learned: a prefill takes alpha_s + uncached tokens / tokens_per_s
    prefill_tokens_per_s: float = 0.0  # 0: too fast to tell
    hit_ratio: float = 0.0  # learned: the part of a prompt that the prefix cache has
    answer_tokens: int = 0  # learned: how long an answer gets
    moves: int = 0  # to another device
    others: list[RuntimeStatus] = []  # its runtimes beside that one


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device's budget as the router sees it."""

    name: str
    budget_bytes: int
    charged_bytes: int
    kvpr: float
    kv_pressure: float = 0.0  # the part of its KV memory that is asked for; above 1: more than there is
    compute_pressure: float = 0.0  # seconds of it that are asked for a second


class Status(Message, frozen=True):
    """Sent to every api_server once a second and at each change of a state."""

    epoch: int
    models: list[ModelStatus]
    devices: list[DeviceStatus]
    events: list[str] = []  # newest last: "chat: slept in 0.021 s (idle 46 s, code wants memory)"
    undecodable: int = 0  # frames that the router could not read and dropped


RouterToApi = Introduce | Grant | Refuse | Lost | AdminReply | Status


# ---------------------------------------------------------------- router -> runtime


class Sleep(Message, frozen=True):
    """Drop KV, give weights back. Answered by Slept, or by SleepRefused if something is in flight.

    ``keep_weights``: only as many of their pages as neighbours ask for, so that waking costs no more than that.
    ``preempt``: what is in flight stays so, and is answered further after the wake.
    """

    runtime: RuntimeId
    keep_weights: bool = False
    preempt: bool = False


class Wake(Message, frozen=True):
    """Reserve, map, copy. Answered by Woke or WakeFailed."""

    runtime: RuntimeId


class SetQuota(Message, frozen=True):
    """New floor and ceiling of KV, in bytes."""

    runtime: RuntimeId
    floor_bytes: int
    ceiling_bytes: int


class AskHello(Message, frozen=True):
    """The router does not know this runtime (it restarted): send a Hello."""

    epoch: int


RouterToRuntime = Sleep | Wake | SetQuota | AskHello


# ---------------------------------------------------------------- runtime -> router


class Hello(Message, frozen=True):
    """A runtime is ready, or introduces itself again to a new router."""

    runtime: RuntimeId
    model: str
    device: str
    state: RuntimeState  # AWAKE or ASLEEP (WAKING while a wake is under way)
    facts: RuntimeFacts
    running: list[RequestKey] = []
    start_s: float = 0.0


class Started(Message, frozen=True):
    """The runtime has taken this request up."""

    runtime: RuntimeId
    request: RequestId
    attempt: int


class FirstToken(Message, frozen=True):
    """The first byte of the answer left the engine, ``ttft_s`` after the runtime took the request up."""

    runtime: RuntimeId
    request: RequestId
    attempt: int
    ttft_s: float


class Finished(Message, frozen=True):
    """The request is over at this runtime. ``outcome``: "ok", "error", "cancelled"."""

    runtime: RuntimeId
    request: RequestId
    attempt: int
    outcome: str
    status: int
    total_s: float
    prompt_tokens: int = 0  # 0: unknown
    cached_tokens: int = 0
    completion_tokens: int = 0


class Slept(Message, frozen=True):
    runtime: RuntimeId
    seconds: float


class SleepRefused(Message, frozen=True):
    """Still busy: the router thought nothing was in flight."""

    runtime: RuntimeId
    reason: str


class Woke(Message, frozen=True):
    runtime: RuntimeId
    seconds: float


class WakeFailed(Message, frozen=True):
    """Memory did not come in time: it sleeps on and may be asked again. A runtime whose device failed ends instead."""

    runtime: RuntimeId
    reason: str


class Load(Message, frozen=True):
    """Sent by every runtime a few times a second when it changed, once a second else: also the heartbeat."""

    runtime: RuntimeId
    state: RuntimeState
    weights_bytes: int
    kv_bytes: int
    wanted_bytes: int  # KV that it would take now and does not get
    in_flight: int


RuntimeToRouter = Hello | Started | FirstToken | Finished | Slept | SleepRefused | Woke | WakeFailed | Load


# ---------------------------------------------------------------- router <-> supervisor


class StartRuntime(Message, frozen=True):
    """router -> supervisor: start a worker for this model on this device."""

    runtime: RuntimeId
    model: str
    device: str


class StopRuntime(Message, frozen=True):
    """router -> supervisor: end that worker; answered by RuntimeExited."""

    runtime: RuntimeId
    reason: str


class SupervisorHello(Message, frozen=True):
    """supervisor -> router: which runtimes are alive (at start none), and those that still start."""

    alive: list[RuntimeId] = []


class RuntimeExited(Message, frozen=True):
    """supervisor -> router: the worker and all its children are gone; its granules return.

    ``error``: what the end of its log tells, for the states of models; whose request is lost is told the reason only.
    """

    runtime: RuntimeId
    reason: str
    error: str = ""
    expected: bool = False

    @property
    def whole_reason(self) -> str:
        return f"{self.reason}: {self.error}" if self.error else self.reason


RouterToSupervisor = StartRuntime | StopRuntime | Introduce
SupervisorToRouter = SupervisorHello | RuntimeExited


# ---------------------------------------------------------------- api_server <-> runtime (the token path)


class Forward(Message, frozen=True):
    """api_server -> runtime, with the body as second frame: one HTTP request for the runtime's ASGI app."""

    request: RequestId
    attempt: int
    method: str
    path: str  # as SGLang's app knows it, without /m/<model>
    query: bytes
    headers: list[tuple[bytes, bytes]]
    credit: int  # chunks that may be sent before more credit comes
    counted: bool = True  # False: not a generation (model info and the like), no Finished for the router
    due: Due | None = None  # as the Grant had it


class Credit(Message, frozen=True):
    """api_server -> runtime: that many more chunks have left for the client."""

    request: RequestId
    attempt: int
    chunks: int


class Cancel(Message, frozen=True):
    """api_server -> runtime: the client has gone."""

    request: RequestId
    attempt: int


class Ping(Message, frozen=True):
    """api_server -> runtime: are you there? Answered by Pong with the requests it is answering for us."""


ApiToRuntime = Forward | Credit | Cancel | Ping


class Head(Message, frozen=True):
    """runtime -> api_server: status and headers of the answer."""

    request: RequestId
    attempt: int
    status: int
    headers: list[tuple[bytes, bytes]]


class Chunk(Message, frozen=True):
    """runtime -> api_server, bytes as second frame. ``seq`` counts from 0: a gap is a loss."""

    request: RequestId
    attempt: int
    seq: int
    last: bool


class Broke(Message, frozen=True):
    """runtime -> api_server: the app failed; ``started`` tells whether a Head was sent."""

    request: RequestId
    attempt: int
    started: bool
    message: str


class Pong(Message, frozen=True):
    runtime: RuntimeId
    running: list[RequestKey] = []


RuntimeToApi = Head | Chunk | Broke | Pong


# ---------------- supervisor <-> standby (JSON, SOCK_SEQPACKET pair)


class Spawn(Message, frozen=True):
    """supervisor -> standby: start a worker process for this spec, in a session of its own."""

    spec: RuntimeSpec


class Kill(Message, frozen=True):
    """supervisor -> standby: SIGTERM the worker now, SIGKILL its whole session after ``grace_s``."""

    runtime: RuntimeId
    grace_s: float


SupervisorToStandby = Spawn | Kill


class StandbyReady(Message, frozen=True):
    """standby -> supervisor: the imports are done, Spawn now costs milliseconds."""

    seconds: float


class Spawned(Message, frozen=True):
    """standby -> supervisor: this process has the spec. Late, when the spec had to wait for a process."""

    runtime: RuntimeId
    pid: int


class WorkerExited(Message, frozen=True):
    """standby -> supervisor: the worker and every process of its session are gone."""

    runtime: RuntimeId
    pid: int  # 0: no process ever had the spec
    exit_code: int  # negative: killed by that signal


StandbyToSupervisor = StandbyReady | Spawned | WorkerExited


# ---------------- standby <-> waiting worker (JSON, SOCK_SEQPACKET pair)


class Imported(Message, frozen=True):
    """waiting worker -> standby: it and its children have all imports behind them."""

    seconds: float


class ImportsFailed(Message, frozen=True):
    """waiting worker -> standby: the last thing it says; a traceback is in the standby's log."""

    reason: str


class TakeSpec(Message, frozen=True):
    """standby -> waiting worker: become the worker of this runtime."""

    spec: RuntimeSpec
    wanted_at_s: float  # CLOCK_MONOTONIC, one for the host: the start is counted from here


WaitingToStandby = Imported | ImportsFailed


# ---------------- runtime <-> image store (JSON, AF_UNIX SOCK_SEQPACKET)


class FindImage(Message, frozen=True):
    """Is there, or will there be, an image of these weights in whatever layout? ``known`` or ``unknown``."""

    source: str  # what keys of its images begin with, before a dash


class OpenImage(Message, frozen=True):
    """Ask for the memfd of these weights. The answer waits while another runtime is still writing it."""

    key: str
    size_bytes: int
    name: str  # for people: the model's name


class SealImage(Message, frozen=True):
    """The image is written, and no writable mapping is left: seal it and keep it. Carries the memfd as SCM_RIGHTS."""

    key: str


class ImageReply(Message, frozen=True):
    """``new``: write it, then SealImage (closing the connection drops it). ``ready``: sealed, with the memfd.
    ``sealed`` answers SealImage, ``known`` and ``unknown`` FindImage. ``refused``: see ``reason``."""

    status: str  # "known" | "unknown" | "new" | "ready" | "sealed" | "refused"
    reason: str = ""


ImageRequest = FindImage | OpenImage | SealImage

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode

decode_api_to_router = msgspec.msgpack.Decoder(ApiToRouter).decode
decode_router_to_api = msgspec.msgpack.Decoder(RouterToApi).decode
decode_router_to_runtime = msgspec.msgpack.Decoder(RouterToRuntime).decode
decode_runtime_to_router = msgspec.msgpack.Decoder(RuntimeToRouter).decode
decode_router_to_supervisor = msgspec.msgpack.Decoder(RouterToSupervisor).decode
decode_supervisor_to_router = msgspec.msgpack.Decoder(SupervisorToRouter).decode
decode_api_to_runtime = msgspec.msgpack.Decoder(ApiToRuntime).decode
decode_runtime_to_api = msgspec.msgpack.Decoder(RuntimeToApi).decode
# What a decoder raises on a frame that it can't read: count it and drop it.
DECODE_ERRORS = (msgspec.DecodeError, msgspec.ValidationError)

encode_json = msgspec.json.encode
decode_runtime_spec = msgspec.json.Decoder(RuntimeSpec).decode
decode_supervisor_to_standby = msgspec.json.Decoder(SupervisorToStandby).decode
decode_standby_to_supervisor = msgspec.json.Decoder(StandbyToSupervisor).decode
decode_waiting_to_standby = msgspec.json.Decoder(WaitingToStandby).decode
decode_standby_to_waiting = msgspec.json.Decoder(TakeSpec).decode
decode_image_request = msgspec.json.Decoder(ImageRequest).decode
decode_image_reply = msgspec.json.Decoder(ImageReply).decode
