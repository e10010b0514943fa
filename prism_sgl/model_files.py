"""What a model's own files tell before any engine runs: its weights, its KV a token, its context.

No torch: a safetensors file begins with the length of a JSON header and that header, so the sizes of all tensors are
known without reading one of them. What the files do not tell is 0, "unknown".
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from prism_sgl.units import GRANULE_BYTES, round_up

_DTYPE_BYTES = {
    "float32": 4,
    "float": 4,
    "float16": 2,
    "half": 2,
    "bfloat16": 2,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}
_FLOAT_TENSORS = frozenset({"F64", "F32", "F16", "BF16"})  # stored so, but held in the engine's dtype
_MAX_HEADER_BYTES = 256 << 20


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """0 is "unknown": the engine's own Hello has the last word on all three."""

    weights_bytes: int = 0  # whole granules
    kv_bytes_per_token: int = 0
    context_tokens: int = 0


def read_facts(path: Path, engine_args: Mapping[str, object]) -> ModelFacts:
    """Facts of the model in the folder ``path``. ValueError: its files are broken."""
    if path.is_file():  # a GGUF: its size is about what it will take
        return ModelFacts(
            weights_bytes=round_up(path.stat().st_size, GRANULE_BYTES),
            context_tokens=_positive(engine_args.get("context_length")),
        )
    outer = _read_json(path / "config.json")
    inner = outer.get("text_config")
    config: dict[str, Any] = {**outer, **inner} if isinstance(inner, dict) else outer
    dtype_bytes = _dtype_bytes(config, engine_args)
    return ModelFacts(
        # Of a quantised model SGLang keeps the scales and what was left out as they are stored.
        weights_bytes=round_up(
            _weights_bytes(path, None if "quantization_config" in config else dtype_bytes), GRANULE_BYTES
        ),
        kv_bytes_per_token=_kv_bytes_per_token(config, engine_args, dtype_bytes),
        context_tokens=_positive(engine_args.get("context_length"))
        or _positive(config.get("max_position_embeddings")),
    )


def read_cached_facts(hub_id: str, engine_args: Mapping[str, object]) -> ModelFacts:
    """Facts of a model as the hub's cache on this machine has it; all unknown where SGLang has yet to fetch it.

    Raises:
        ValueError: it is no id of the hub.
    """
    from huggingface_hub import try_to_load_from_cache  # half a second, for those who name a hub id

    revision, cache_dir = (
        str(engine_args[key]) if key in engine_args else None for key in ("revision", "download_dir")
    )
    found = try_to_load_from_cache(hub_id, "config.json", cache_dir=cache_dir, revision=revision)
    if isinstance(found, str):
        with contextlib.suppress(ValueError, OSError):  # a part of it is still to come
            return read_facts(Path(found).parent, engine_args)
    return ModelFacts()


def _dtype_bytes(config: Mapping[str, Any], engine_args: Mapping[str, object]) -> int:
    wanted = str(engine_args.get("dtype", "auto"))
    if wanted == "auto":
        # SGLang runs float32 checkpoints in half precision unless told otherwise.
        return 2
    return _DTYPE_BYTES.get(wanted, 2)


def _kv_bytes_per_token(
    config: Mapping[str, Any], engine_args: Mapping[str, object], dtype_bytes: int
) -> int:
    if config.get("kv_lora_rank"):  # MLA keeps one latent instead of heads
        return 0
    heads = _positive(config.get("num_attention_heads"))
    kv_heads = _positive(config.get("num_key_value_heads")) or heads
    layers = _positive(config.get("num_hidden_layers"))
    head_dim = _positive(config.get("head_dim"))
    if not head_dim and heads:
        head_dim = _positive(config.get("hidden_size")) // heads
    kv_dtype = str(engine_args.get("kv_cache_dtype", "auto"))
    return layers * 2 * kv_heads * head_dim * _DTYPE_BYTES.get(kv_dtype, dtype_bytes)


def _weights_bytes(folder: Path, dtype_bytes: int | None) -> int:
    """``dtype_bytes`` of a number in the engine; None: as in the file."""
    files = _weight_files(folder)
    if files:
        return sum(_tensor_bytes(file, dtype_bytes) for file in files)
    return sum(file.stat().st_size for file in folder.glob("*.bin") if file.name != "training_args.bin")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise ValueError(f"{index.name} has no weight_map of file names")
        return [folder / name for name in sorted(set(named.values()))]
    # "consolidated" files are a second copy of the same weights.
    return sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith("consolidated"))


def _tensor_bytes(file: Path, dtype_bytes: int | None) -> int:
    total = 0
    for name, tensor in _safetensors_header(file).items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = tensor["dtype"], tensor["shape"]
            begin, end = tensor["data_offsets"]
            if dtype in _FLOAT_TENSORS and dtype_bytes is not None:
                total += math.prod(shape) * dtype_bytes
            else:
                total += end - begin
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name} has a broken header at {name!r}") from error
    return total


def _safetensors_header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            header = json.loads(opened.read(length))
    except (OSError, struct.error, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read as safetensors ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file.name} has a header that is no table")
    return header


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no table")
    return content


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
