"""Folders that look like models to whoever reads only headers: sparse files, no weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_safetensors(file: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """Tensors by name: dtype, shape, bytes. The data is a hole in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, size_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size_bytes]}
        end += size_bytes
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def write_model(
    folder: Path, *, weights_bytes: int, layers: int, kv_heads: int, head_dim: int, context: int
) -> Path:
    folder.mkdir(parents=True)
    config = {
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * 4,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {"w": ("BF16", [weights_bytes // 2], weights_bytes)})
    return folder
