"""Every route of SGLang 0.5.17 and of our own, and what we do with it.

A test reads SGLang's source and fails on a route that is not here, so that a new one cannot slip through: it
could run a forward on a sleeping model, or make the weight image or the ledger untrue.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from prism_sgl.launch.errors_http import HttpError


class Kind(enum.Enum):
    PASS = "pass"  # needs a forward: queued, granted, counted
    INFO = "info"  # passed to the model's runtime, awake or asleep; never wakes it
    OURS = "ours"  # answered here, never by a runtime
    ADMIN = "admin"  # like INFO or OURS, with an admin key or from loopback only
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Route:
    methods: frozenset[str]
    path: str  # {name}: one segment; {name:path}: the rest
    kind: Kind
    reason: str = ""  # of a refusal
    under_model: Kind | None = None  # with the base URL of a model, if not ``kind``


_MEMORY = "the memory of models is managed by prism_sgl; use /api/v1/models/{model}/sleep and /wake"
_WEIGHTS = (
    "it would make the weight image that sleeping models wake from untrue; change models.toml and restart"
)
_READS_WEIGHTS = "the weights of a model that sleeps are not there to be read"
_PAUSE = "the router orders requests; use /api/v1/models/{model}/drain to stop a model"
_LORA = "LoRA adapters are not supported on elastic memory yet"
_CORPUS = "speculative decoding is not supported on elastic memory yet"
_HICACHE = "HiCache is not supported on elastic memory yet"
_STATE = (
    "it would change settings of the engine that the router has been told; set engine_args in models.toml"
)
_LOGS = "prompts are never logged"
_ELASTIC_EP = "expert parallelism is not supported on elastic memory yet"

# METHODS PATH [reason]; GET implies HEAD.
_PASS = """
POST,PUT /generate
POST,PUT /encode
POST,PUT /classify
POST /v1/completions
POST /v1/chat/completions
POST /v1/embeddings
POST /v1/classify
POST /v1/audio/transcriptions
POST /v1/score
POST /v1/responses
POST,PUT /v1/rerank
POST /api/chat
POST /api/generate
POST /v1/messages
POST /invocations
POST /vertex_generate
"""
_INFO = """
GET /get_model_info
GET /model_info
GET /get_weight_version
GET /weight_version
GET /get_server_info
GET /server_info
GET /get_load
GET /v1/loads
POST,PUT,GET /open_session
POST,PUT,GET /close_session
POST /parse_function_call
POST /separate_reasoning
POST /v1/tokenize
POST /tokenize
POST /v1/detokenize
POST /detokenize
GET /v1/responses/{response_id}
POST /v1/responses/{response_id}/cancel
POST /api/show
POST /v1/messages/count_tokens
GET /openapi.json
GET /docs
GET /docs/oauth2-redirect
GET /redoc
"""
_OURS = """
GET /
GET /live
GET /ready
GET /health
GET /health_generate
GET /ping
GET /v1/models
GET /v1/models/{model:path}
GET /running
GET /is_sleeping
GET /api/ps
GET /api/tags
GET /api/version
GET /api/v1/models
GET /api/v1/models/{model:path}
GET /api/v1/devices
GET /api/v1/events
"""
_ADMIN_OURS = """
POST /sleep
POST /wake_up
POST /api/models/unload/{model:path}
POST /api/v1/models/{model:path}/load
POST /api/v1/models/{model:path}/unload
POST /api/v1/models/{model:path}/sleep
POST /api/v1/models/{model:path}/wake
POST /api/v1/models/{model:path}/pin
POST /api/v1/models/{model:path}/unpin
POST /api/v1/models/{model:path}/drain
POST /api/v1/models/{model:path}/move
GET /api/v1/models/{model:path}/explain
"""
_ADMIN = """
GET,POST /flush_cache
POST /abort_request
GET,POST /start_profile
GET,POST /stop_profile
GET,POST /set_trace_level
GET,POST /freeze_gc
GET,POST /start_expert_distribution_record
GET,POST /stop_expert_distribution_record
GET,POST /dump_expert_distribution_record
"""
_REFUSED = [
    (
        _MEMORY,
        """
GET,POST /release_memory_occupation
GET,POST /resume_memory_occupation
""",
    ),
    (
        _WEIGHTS,
        """
POST /update_weights_from_disk
POST /init_weights_update_group
POST /destroy_weights_update_group
POST /update_weights_from_tensor
POST /update_weights_from_distributed
POST /update_weights_from_ipc
POST /update_weight_version
""",
    ),
    (
        _READS_WEIGHTS,
        """
GET,POST /get_weights_by_name
GET,POST /weights_checker
POST /init_weights_send_group_for_remote_instance
POST /send_weights_to_remote_instance
GET /get_remote_instance_transfer_engine_info
GET /remote_instance_transfer_engine_info
""",
    ),
    (
        _PAUSE,
        """
POST /pause_generation
POST /continue_generation
GET,POST /slow_down
""",
    ),
    (
        _LORA,
        """
POST /load_lora_adapter
POST /load_lora_adapter_from_tensors
POST /unload_lora_adapter
""",
    ),
    (
        _CORPUS,
        """
POST /add_external_corpus
POST /remove_external_corpus
GET /list_external_corpora
""",
    ),
    (
        _HICACHE,
        """
GET,POST /clear_hicache_storage_backend
POST /hicache/storage-backend/clear
GET,PUT,DELETE /hicache/storage-backend
""",
    ),
    (
        _STATE,
        """
POST,PUT /set_internal_state
POST /dumper/{method}
""",
    ),
    (
        _LOGS,
        """
GET,POST /configure_logging
""",
    ),
    (
        _ELASTIC_EP,
        """
POST /scale_elastic_ep
GET /is_scaling_elastic_ep
""",
    ),
    (
        "WebSockets are not carried to models",
        """
GET,WEBSOCKET /v1/realtime
""",
    ),
]


def _parse(text: str, kind: Kind, reason: str = "") -> list[Route]:
    routes = []
    for line in text.strip().splitlines():
        methods, path = line.split(" ")
        verbs = set(methods.split(","))
        routes.append(Route(frozenset(verbs | ({"HEAD"} if "GET" in verbs else set())), path, kind, reason))
    return routes


ROUTES: tuple[Route, ...] = (
    *_parse(_PASS, Kind.PASS),
    *_parse(_INFO, Kind.INFO),
    *_parse(_OURS, Kind.OURS),
    Route(frozenset({"GET", "HEAD"}), "/metrics", Kind.OURS, under_model=Kind.INFO),
    *_parse(_ADMIN_OURS, Kind.ADMIN),
    *_parse(_ADMIN, Kind.ADMIN),
    *(route for reason, text in _REFUSED for route in _parse(text, Kind.REFUSED, reason)),
)

_EXACT = {route.path: route for route in ROUTES if "{" not in route.path}


def _pattern(path: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\{(\w+):path\\}", r"(?P<\1>.+)", re.escape(path))
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", escaped))


# The longest first: /api/v1/models/{model:path}/load before /api/v1/models/{model:path}.
_PATTERNS = sorted(
    ((_pattern(route.path), route) for route in ROUTES if "{" in route.path),
    key=lambda entry: -len(entry[1].path),
)


def find(method: str, path: str) -> tuple[Route, dict[str, str]]:
    """The route of this path and its path parameters. Raises HttpError 404 or 405."""
    route = _EXACT.get(path)
    if route is not None and method in route.methods:
        return route, {}
    known = route is not None
    for pattern, other in _PATTERNS:
        if (match := pattern.fullmatch(path)) is not None:
            if method in other.methods:
                return other, match.groupdict()
            known = True
    if known:
        raise HttpError(405, "method_not_allowed", f"{path} does not take {method}")
    raise HttpError(
        404, "not_found", f"there is no route {path[:200]}; see SGLang's and prism_sgl's documentation"
    )
