"""What no single value shows: names taken twice, budgets that cannot hold what is asked of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prism_sgl import addresses, footprint
from prism_sgl.errors import ConfigError
from prism_sgl.messages import RuntimeId
from prism_sgl.units import GRANULE_BYTES, round_up, show_size

if TYPE_CHECKING:
    from prism_sgl.config import Config, DeviceConfig, ModelConfig

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")
_DEVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MAX_SOCKET_PATH_BYTES = 107  # sun_path without its closing zero
# A runtime is an owner in its device's ledger, and so long are the names there (allocator/ledger_table.py).
_MAX_RUNTIME_ID_BYTES = 64
# Routers of an instance, and the starts of one router (schedulers/lifecycle.py): months of failures and moves.
_LATE_START = "99-99999"
# Ours to set; each has a key of its own, or none because it would make the budget untrue.
_OWN_ENGINE_ARGS = {
    "model": "path",
    "model_path": "path",
    "served_model_name": "the name of the table, or aliases",
    "page_size": "block_tokens",
    "host": "[server] host",
    "port": "[server] port",
    "api_key": "[server] api_keys",
    "mem_fraction_static": "memory of [[devices]]",
    "max_total_tokens": "max_kv",
    "device": "kind of [[devices]]",
    "base_gpu_id": "index of [[devices]]",
}


def check_names(config: Config) -> None:
    """Each name and alias means one model; names can stand in URLs, sockets and runtime ids."""
    taken: dict[str, str] = {}
    files: dict[str, str] = {}
    for model in config.models.values():
        where = f"models.{model.name}"
        for key, name in ((where, model.name), *((f"{where}.aliases", alias) for alias in model.aliases)):
            if _MODEL_NAME.fullmatch(name) is None:
                # Its served_model_name may have none, and "base:adapter" in a request asks for a LoRA adapter.
                why = ", and SGLang reads what follows a colon as an adapter" if ":" in name else ""
                _fail(
                    config,
                    key if key.isprintable() else repr(key),
                    f"has the name {name!r:.60}{why}",
                    _NAME_REMEDY,
                )
            if name in taken:
                problem = f'is "{name}", which {taken[name]} is too'
                _fail(config, key, problem, "give each model names of its own")
            taken[name] = key
        if other := files.get(file := addresses.phases("", RuntimeId(model.name))):
            _fail(config, where, f"cannot be told from models.{other} in file names", "rename one of them")
        files[file] = model.name
        for argument in model.engine_args:
            if argument in _OWN_ENGINE_ARGS:
                remedy = f"use {_OWN_ENGINE_ARGS[argument]} instead"
                _fail(config, f"{where}.engine_args.{argument}", "is set by prism_sgl", remedy)
            if "-" in argument or argument.startswith("_"):
                remedy = f"did you mean {argument.strip('-').replace('-', '_')}?"
                _fail(config, f"{where}.engine_args.{argument}", "is no name of a SGLang argument", remedy)


_NAME_REMEDY = "use letters, digits and . _ / + - only, beginning with a letter or digit"


def check_devices(config: Config) -> None:
    names = [device.name for device in config.devices]
    places: dict[tuple[str, int], str] = {}
    for number, device in enumerate(config.devices):
        where = f"devices[{number}]"
        if _DEVICE_NAME.fullmatch(device.name) is None:
            remedy = "use letters, digits, _ and - only, beginning with a letter or digit"
            _fail(config, f"{where}.name", f"is {device.name!r}", remedy)
        if device.name in names[:number]:
            _fail(config, f"{where}.name", f'is "{device.name}", which another device is too', "rename one")
        place = (device.kind, device.index)
        if device.kind == "cuda" and place in places:
            problem = f"is {device.index}, which devices.{places[place]} is too"
            _fail(config, f"devices.{device.name}.index", problem, "give each GPU one device")
        places[place] = device.name
    for model in config.models.values():
        for wanted in model.devices:
            if wanted not in names:
                near = difflib.get_close_matches(wanted, names, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"known devices: {', '.join(names)}"
                _fail(config, f"models.{model.name}.devices", f'has "{wanted}", which is no device', remedy)


def check_fit(config: Config) -> None:
    """Every model fits on a device with one request of full length, beside the pinned ones there."""
    for model in config.models.values():
        _check_kv(config, model)
        largest = max(allowed_devices(config, model), key=lambda device: device.memory_bytes)
        needed = least_bytes(config, model)
        if needed > largest.memory_bytes:
            _fail(
                config,
                f"models.{model.name}",
                f"needs {show_size(needed)} ({show_size(model.weights_bytes)} of them weights, and KV for a request "
                f"of {model.context_tokens} tokens), more than "
                f"the {show_size(largest.memory_bytes)} of {largest.name}",
                "give a device more memory, or lower engine_args.context_length or min_kv",
            )
    groups = _pinned_groups(config)
    for group in groups:
        if group.left_bytes < 0:
            _fail(
                config,
                f"models.{group.name}.pin",
                f"is true, but pinned {', '.join(group.models)} need {show_size(group.needed_bytes)} "
                f"of the {show_size(group.budget_bytes)} on {', '.join(sorted(group.devices))}",
                "pin fewer models",
            )
    for model in config.models.values():
        if not model.pin:
            _check_beside_pinned(config, model, groups)


@dataclass(frozen=True)
class _PinnedGroup:
    """Pinned models that can be on these devices only: whatever fits there has to fit beside all of them."""

    name: str  # of the model that can be on all of these
    models: tuple[str, ...]
    devices: frozenset[str]
    needed_bytes: int
    budget_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.budget_bytes - self.needed_bytes


def _pinned_groups(config: Config) -> list[_PinnedGroup]:
    needed = {model.name: least_bytes(config, model) for model in config.models.values() if model.pin}
    places = {
        name: frozenset(
            device.name
            for device in allowed_devices(config, config.models[name])
            if device.memory_bytes >= needed_bytes
        )
        for name, needed_bytes in needed.items()
    }
    groups = []
    for name, devices in places.items():
        models = tuple(other for other in needed if places[other] <= devices)
        budget = sum(device.memory_bytes for device in config.devices if device.name in devices)
        groups.append(_PinnedGroup(name, models, devices, sum(needed[m] for m in models), budget))
    return groups


def _check_beside_pinned(config: Config, model: ModelConfig, groups: Sequence[_PinnedGroup]) -> None:
    """Pinned models never give way, so each request to one that has no room beside them would be refused.

    How pinned models that have a choice are spread over their devices is placement's to find; an error is only what
    no placement could mend.
    """
    needed = least_bytes(config, model)
    tightest = []
    for device in allowed_devices(config, model):
        there = [group for group in groups if device.name in group.devices]
        if device.memory_bytes < needed:
            continue
        if not there or (group := min(there, key=lambda group: group.left_bytes)).left_bytes >= needed:
            return
        tightest.append(group)
    roomiest = max(tightest, key=lambda group: group.left_bytes)
    _fail(
        config,
        f"models.{model.name}",
        f"needs {show_size(needed)}, more than the {show_size(roomiest.left_bytes)} that pinned "
        f"{', '.join(roomiest.models)} leave of the {show_size(roomiest.budget_bytes)} on "
        f"{', '.join(sorted(roomiest.devices))}",
        "pin fewer models, or give a device more memory",
    )


def allowed_devices(config: Config, model: ModelConfig) -> Iterable[DeviceConfig]:
    return [device for device in config.devices if not model.devices or device.name in model.devices]


def least_bytes(config: Config, model: ModelConfig) -> int:
    """What the model must hold to answer its longest request, as far as its files tell."""
    memory = config.memory
    floor = max(_one_request_bytes(config, model), round_up(model.min_kv_bytes, memory.kv_page_bytes))
    overhead = footprint.overhead_bytes(device.kind for device in allowed_devices(config, model))
    return footprint.weights_bytes(model.weights_bytes, memory.weights_page_bytes) + floor + overhead


def _one_request_bytes(config: Config, model: ModelConfig) -> int:
    """KV for one request of full length, in whole pages."""
    return footprint.floor_bytes(
        request_tokens=model.context_tokens,
        block_tokens=model.block_tokens,
        token_bytes=model.kv_bytes_per_token,
        page_bytes=config.memory.kv_page_bytes,
    )


def _check_kv(config: Config, model: ModelConfig) -> None:
    one = model.kv_bytes_per_token * model.context_tokens
    # A pool holds whole pages. What the files do not tell is left to the engine.
    one_in_pages = _one_request_bytes(config, model) if one else 0
    pages = f", in pages of {show_size(config.memory.kv_page_bytes)}"
    for key, size_bytes, low_bytes, how in (
        ("min_kv", model.min_kv_bytes, one, ""),
        ("max_kv", model.max_kv_bytes, one_in_pages, pages),
    ):
        if 0 < size_bytes < low_bytes:
            least_mib = round_up(low_bytes, GRANULE_BYTES) >> 20  # GiB with two digits may be less
            _fail(
                config,
                f"models.{model.name}.{key}",
                f"is {show_size(size_bytes)}, less than one request of full length "
                f"({model.context_tokens} tokens x {model.kv_bytes_per_token} bytes{how})",
                f'give at least "{least_mib}MiB" or lower engine_args.context_length',
            )
    if 0 < model.max_kv_bytes < model.min_kv_bytes:
        problem = f"is {show_size(model.min_kv_bytes)}, more than max_kv ({show_size(model.max_kv_bytes)})"
        _fail(config, f"models.{model.name}.min_kv", problem, "lower it or raise max_kv")


def check_runtime_names(config: Config) -> None:
    """Owners of a ledger and Unix sockets have short names, and an engine would fail long after the start."""
    for model in config.models.values():
        for device in allowed_devices(config, model):
            runtime = RuntimeId(f"{model.name}@{device.name}.{_LATE_START}")
            if (excess := len(runtime.encode()) - _MAX_RUNTIME_ID_BYTES) > 0:
                problem = f"makes names of {len(runtime.encode())} bytes, as {runtime}: {excess} too many"
                remedy = f"give it a shorter one and this one as alias, or {device.name} a shorter one"
                _fail(config, f"models.{model.name}", problem, remedy)
            sockets = (
                addresses.runtime_requests(config.server.run_dir, runtime).removeprefix("ipc://"),
                addresses.first_tokens(config.server.run_dir, runtime),
            )
            longest = max(len(path.encode()) for path in sockets)
            if (excess := longest - _MAX_SOCKET_PATH_BYTES) > 0:
                problem = f"makes a socket name of {longest} bytes for {model.name}: {excess} too many"
                _fail(config, "server.run_dir", problem, "give a shorter folder, or shorter names")


def _fail(config: Config, key: str, problem: str, remedy: str) -> None:
    raise ConfigError(key, problem, remedy, file=config.file)
