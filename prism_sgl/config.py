"""models.toml as one tree of structs. Only this module reads configuration files and the environment.

A typo is an error, not a default: every struct forbids unknown fields, and every wrong value becomes one
ConfigError line with file, key, value and remedy (exit code 78). A key of the file is the name of its field
without the unit, because the value carries one: ``max_body = "32MiB"`` becomes ``max_body_bytes``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from prism_sgl import machine
from prism_sgl.config_cards import ORDER, VISIBLE
from prism_sgl.config_checks import check_devices, check_fit, check_names, check_runtime_names
from prism_sgl.config_table import Table, keys_of, read_toml, show_value
from prism_sgl.errors import ConfigError
from prism_sgl.model_files import ModelFacts, read_cached_facts, read_facts
from prism_sgl.units import GRANULE_BYTES, round_down


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
    run_dir: str = ""  # load() fills in the default (_default_run_dir)
    log_dir: str = ""  # default: <run_dir>/logs
    log_level: str = "info"


class MemoryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    kv_page_bytes: int = 2 << 20  # key kv_page; 128 MiB with a CUDA device, where costs are per page
    weights_page_bytes: int = 2 << 20  # key weights_page; likewise
    host_cache_bytes: int = 0  # key host_cache: cap of all weight images; 0: half of the host's memory


class SchedulerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    sleep_after_s: float = 45.0  # an idle model may sleep after this, if others want its memory
    min_residence_s: float = 2.0  # a model that woke stays at least this long
    max_wait_s: float = 10.0  # a request that waited so long for memory lets its model take turns
    window_s: float = 60.0  # token rates are averages over this
    prefill_window: int = 4  # a device may have as many without a first token, however long their prefill
    start_parallel: int = 2  # engines that may start at the same time
    min_move_gain: float = 0.10  # a move must lower the largest pressure by this part, and pay for itself
    spares: bool = (
        False  # each model also sleeps on a second device; with several CUDA devices the default is true
    )
    move_drain_s: float = 300.0  # requests that a moved model's old runtime still answers have so long to end


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
    kv_share: float = 1.0  # of what busy models borrow beyond their min_kv, against the others' shares
    block_tokens: int = 1
    devices: tuple[str, ...] = ()  # names it may be placed on; none: any
    engine_args: dict[str, object] = {}
    env: dict[str, str] = {}
    # The model whose requests it computes too, on one more device. Replays only: engines have one device each.
    part_of: str = ""
    # Read from the model's own files (model_files.py), 0 where they tell nothing:
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


def load(path: str | Path) -> Config:
    """The configuration in this file, complete and checked. Raises ConfigError."""
    file = str(path)
    raw = read_toml(Path(path).expanduser(), file)
    root = Table(file, "", raw, [*keys_of(Config)][:-1])
    server = _server(_section(root, "server", ServerConfig))
    devices = _devices(root)
    scheduler = _scheduler(_section(root, "scheduler", SchedulerConfig), devices)
    memory = _memory(_section(root, "memory", MemoryConfig), devices)
    models = _models(root)
    config = Config(
        server=server, memory=memory, scheduler=scheduler, devices=devices, models=models, file=file
    )
    check_names(config)
    check_devices(config)
    check_fit(config)
    check_runtime_names(config)
    return config


def save(config: Config, path: Path) -> None:
    """For ``restore`` in processes that start again: as read and checked, with what the models' files told then."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:  # it has api_keys
        shown = os.fsencode(config.file).decode(errors="replace")  # for messages
        file.write(msgspec.json.encode(msgspec.structs.replace(config, file=shown)))


def restore(path: str | Path) -> Config:
    """What ``save`` has written. Reads no other file. Raises ConfigError."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Config)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        problem = f"is not a configuration that this version has written ({error})"
    remedy = "start the whole server again, which writes it anew"
    raise ConfigError("the file", problem, remedy, file=str(path))


def _default_run_dir(port: int) -> str:
    # logind removes XDG_RUNTIME_DIR at a user's last logout, under a server that runs on, unless the user lingers.
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isdir(base) or not machine.user_lingers():
        base = "/tmp"  # not TMPDIR: what a killed instance left is found from any shell, and sockets have short names
    return f"{base}/prism_sgl-{os.getuid()}-{port}"


def log_dir(config: Config) -> str:
    return config.server.log_dir or f"{config.server.run_dir}/logs"


def cuda_environment() -> dict[str, str]:
    """What the user has told CUDA of the cards that it may use."""
    return {name: os.environ[name] for name in (VISIBLE, ORDER) if name in os.environ}


def server_address(given: str | None) -> str:
    """Base URL of the server that the command line talks to."""
    address = (given or "127.0.0.1:30000").rstrip("/")
    return address if "://" in address else f"http://{address}"


def _section(root: Table, key: str, struct: type[msgspec.Struct]) -> Table:
    return Table(root.file, key, root.values.get(key, {}), keys_of(struct))


def _server(table: Table) -> ServerConfig:
    default = ServerConfig()
    port = table.integer("port", default.port, 1, 65535)
    return ServerConfig(
        host=table.text("host", default.host, example='"127.0.0.1"'),
        port=port,
        api_keys=table.texts("api_keys", example='["a-long-secret"]', secret=True),
        admin_keys=table.texts("admin_keys", example='["another-secret"]', secret=True),
        max_body_bytes=table.size("max_body", default.max_body_bytes, example="32MiB", low=1024),
        max_queue=table.integer("max_queue", default.max_queue, 1),
        activation_timeout_s=table.duration(
            "activation_timeout", default.activation_timeout_s, example="10m"
        ),
        drain_timeout_s=table.duration("drain_timeout", default.drain_timeout_s, example="30s"),
        run_dir=_path(table.text("run_dir", default.run_dir, example='"/run/prism_sgl"'))
        or _default_run_dir(port),
        log_dir=_path(table.text("log_dir", default.log_dir, example='"/var/log/prism_sgl"')),
        log_level=table.text(
            "log_level", default.log_level, example='"info"', choices=("debug", "info", "warning", "error")
        ),
    )


def _memory(table: Table, devices: tuple[DeviceConfig, ...]) -> MemoryConfig:
    default = MemoryConfig()
    if any(device.kind == "cuda" for device in devices):
        default = MemoryConfig(kv_page_bytes=_CUDA_PAGE_BYTES, weights_page_bytes=_CUDA_PAGE_BYTES)
    return MemoryConfig(
        kv_page_bytes=table.page_size("kv_page", default.kv_page_bytes),
        weights_page_bytes=table.page_size("weights_page", default.weights_page_bytes),
        host_cache_bytes=table.size("host_cache", default.host_cache_bytes, example="64GiB"),
    )


# Two models that take turns without end would give each other the device before either has computed anything.
_LEAST_TURN_S = 0.1
# The window is divided: rates have buckets, and a balancing pass follows each twelfth of it.
_LEAST_WINDOW_S = 1.0
# The router knows that an answer is over before its last bytes have reached the api_server.
LAST_WORDS_S = 1.0


def _scheduler(table: Table, devices: tuple[DeviceConfig, ...]) -> SchedulerConfig:
    # A second engine for each model takes the memory of a host that is itself the device.
    default = SchedulerConfig(spares=sum(device.kind == "cuda" for device in devices) > 1)
    return SchedulerConfig(
        sleep_after_s=table.duration("sleep_after", default.sleep_after_s, example="45s"),
        min_residence_s=table.duration("min_residence", default.min_residence_s, example="2s"),
        max_wait_s=table.duration("max_wait", default.max_wait_s, example="10s", low=_LEAST_TURN_S),
        window_s=table.duration("window", default.window_s, example="60s", low=_LEAST_WINDOW_S),
        prefill_window=table.integer("prefill_window", default.prefill_window, 1),
        start_parallel=table.integer("start_parallel", default.start_parallel, 1),
        min_move_gain=table.number("min_move_gain", default.min_move_gain, 0.0, 10.0),
        spares=table.flag("spares", default.spares),
        move_drain_s=table.duration("move_drain", default.move_drain_s, example="5m", low=LAST_WORDS_S),
    )


def _devices(root: Table) -> tuple[DeviceConfig, ...]:
    listed = root.values.get("devices")
    if listed is None:
        return (_whole_host(root),)
    if not isinstance(listed, list) or not listed:
        root.fail("devices", f"is {show_value(listed)}, not a list of tables", "write each as [[devices]]")
    return tuple(_device(root, number, values) for number, values in enumerate(listed))


def _whole_host(root: Table) -> DeviceConfig:
    if num := machine.num_gpus():
        root.fail(
            "devices",
            f"is missing on a machine with {num} GPUs",
            'give each a table [[devices]] with name, kind = "cuda", index and memory, e.g. "70GiB"',
        )
    half = round_down(machine.memory_bytes() // 2, GRANULE_BYTES)
    return DeviceConfig(name="host0", kind="host", memory_bytes=half)


def _device(root: Table, number: int, values: object) -> DeviceConfig:
    table = Table(root.file, f"devices[{number}]", values, keys_of(DeviceConfig))
    name = table.text("name", None, example='"host0"')
    table.where = f"devices.{name}" if name.isprintable() else table.where
    if not table.has("memory"):
        table.fail("memory", "is missing", 'give the budget that all models share, e.g. memory = "1GiB"')
    return DeviceConfig(
        name=name,
        kind=table.text("kind", None, example='"host"', choices=("host", "cuda")),
        index=table.integer("index", 0, 0),
        memory_bytes=round_down(table.size("memory", 0, example="1GiB", low=16 << 20), GRANULE_BYTES),
    )


def _models(root: Table) -> dict[str, ModelConfig]:
    listed = root.values.get("models", {})
    if not isinstance(listed, dict) or not listed:
        root.fail("models", "is empty", 'add a table, e.g. [models.chat] with path = "/models/chat"')
    return {name: _model(root.file, name, values) for name, values in listed.items()}


# Not keys of the file: the table's name, and what model_files.py reads.
_CUDA_PAGE_BYTES = 128 << 20
_NOT_KEYS = frozenset({"name", "part_of", "weights", "kv_bytes_per_token", "context_tokens"})
_SLO_KEYS = ("ttft_ms", "tpot_ms")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _model(file: str, name: str, values: object) -> ModelConfig:
    table = Table(
        file, f"models.{name}", values, [key for key in keys_of(ModelConfig) if key not in _NOT_KEYS]
    )
    default = ModelConfig(name=name, path="")
    engine_args = table.mapping("engine_args")
    path = _path(table.text("path", None, example='"/models/chat"'))
    facts = _facts(table, path, engine_args)
    return ModelConfig(
        name=name,
        path=path,
        aliases=table.texts("aliases", example='["small"]'),
        slo=_slo(Table(file, f"models.{name}.slo", table.mapping("slo"), _SLO_KEYS)),
        priority=table.any_integer("priority", default.priority),
        pin=table.flag("pin", default.pin),
        preload=table.flag("preload", default.preload),
        min_kv_bytes=table.size("min_kv", default.min_kv_bytes, example="64MiB"),
        max_kv_bytes=table.size("max_kv", default.max_kv_bytes, example="512MiB"),
        kv_share=table.number("kv_share", default.kv_share, 0.001, 1000.0),
        block_tokens=table.power_of_two("block_tokens", default.block_tokens, 1024),
        devices=table.texts("devices", example='["host0"]'),
        engine_args=engine_args,
        env=_env(table),
        weights_bytes=facts.weights_bytes,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        context_tokens=facts.context_tokens,
    )


def _slo(table: Table) -> Slo:
    default = Slo()
    return Slo(
        ttft_s=table.milliseconds("ttft_ms", default.ttft_s),
        tpot_s=table.milliseconds("tpot_ms", default.tpot_s),
    )


def _env(table: Table) -> dict[str, str]:
    env = table.mapping("env")
    for key, value in env.items():
        if not isinstance(value, str):
            table.fail(f"env.{key}", f"is {show_value(value)}", f'give text, e.g. {key} = "{value}"')
        if key == VISIBLE:
            table.fail(
                f"env.{key}", "is set by prism_sgl", "use devices of the model and index in [[devices]]"
            )
    return {key: str(value) for key, value in env.items()}


def _facts(table: Table, path: str, engine_args: dict[str, object]) -> ModelFacts:
    remedy = "give the folder of the model's files"
    if not os.path.exists(path):
        why = ""
        if _HUB_ID.fullmatch(path):
            try:
                return read_cached_facts(path, engine_args)
            except ValueError:
                why = " and is no id of the hub"
        table.fail("path", f'is "{path}", which does not exist{why}', remedy)
    if os.path.isdir(path) and not os.path.isfile(f"{path}/config.json"):
        table.fail("path", f'is "{path}", which has no config.json', remedy)
    try:
        return read_facts(Path(path), engine_args)
    except (ValueError, OSError) as error:
        table.fail("path", f'is "{path}", whose {error}', "fetch the model again")


def _path(written: str) -> str:
    """With ~ expanded; a path that exists is made absolute, because all processes must mean the same."""
    expanded = os.path.expanduser(written)
    return (
        os.path.abspath(expanded)
        if expanded and (written != expanded or os.path.exists(expanded))
        else expanded
    )
