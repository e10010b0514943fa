"""models.toml as one tree of structs. Only this module reads configuration files and the environment.

A typo is an error, not a default: every struct forbids unknown fields, and every wrong value becomes one
ConfigError line with file, key, value and remedy (exit code 78).
"""

from __future__ import annotations

import msgspec


class Slo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the user promised: seconds to the first token, and seconds a token after it."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 30000
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()  # none: admin routes only from loopback
    max_body_bytes: int = 32 << 20  # key max_body
    max_queue: int = 1024  # held requests a model; one more is 429
    activation_timeout_s: float = 600.0  # a held request waits at most this long for its model: 503
    drain_timeout_s: float = 30.0  # ordered stop
    run_dir: str = ""  # default: prism_sgl-<uid>-<port> below XDG_RUNTIME_DIR or /tmp
    log_dir: str = ""  # default: <run_dir>/logs
    log_level: str = "info"


class MemoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    kv_page_bytes: int = 2 << 20  # key kv_page
    weights_page_bytes: int = 64 << 20  # key weights_page
    host_cache_bytes: int = 0  # key host_cache: cap of all weight images; 0: half of the host's memory


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    sleep_after_s: float = 45.0  # an idle model may sleep after this, if others want its memory
    min_residence_s: float = 2.0  # a model that woke stays at least this long
    max_wait_s: float = 10.0  # a request that waited so long for memory lets its model take turns
    window_s: float = 60.0  # token rates are averages over this
    prefill_window: int = 4  # granted requests a device that have no first token yet
    start_parallel: int = 2  # engines that may start at the same time
    min_move_gain: float = 0.10


class DeviceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    kind: str  # "host" | "cuda"
    index: int = 0
    memory_bytes: int  # key memory: the budget that all models share


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str  # the table's name
    path: str  # expanded; whatever SGLang takes as --model-path
    aliases: tuple[str, ...] = ()
    slo: Slo = Slo()
    priority: int = 0
    pin: bool = False
    preload: bool = True  # start its engine at launch, else at its first request
    min_kv_bytes: int = 0  # key min_kv; 0: one request of full length
    max_kv_bytes: int = 0  # key max_kv; 0: the whole budget
    block_tokens: int = 1
    devices: tuple[str, ...] = ()  # names it may be placed on; none: any
    engine_args: dict[str, object] = {}
    env: dict[str, str] = {}
    # Read from the model's own files (launch/model_files.py), 0 where they tell nothing:
    weights_bytes: int = 0
    kv_bytes_per_token: int = 0
    context_tokens: int = 0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    server: ServerConfig
    memory: MemoryConfig
    scheduler: SchedulerConfig
    devices: tuple[DeviceConfig, ...]
    models: dict[str, ModelConfig]
    file: str = "models.toml"
