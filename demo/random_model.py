"""Write model folders of real geometries with random weights: true sizes and speeds without a model hub.

    python demo/random_model.py llama1b:/dev/shm/models/one llama8b:/dev/shm/models/eight

Each folder has its own weights (seeded by its name) and a byte-level tokenizer, so that text and token ids both work;
what the model says means nothing. An 8B takes 25 to 50 s with a card, a 1B 5 s.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Llama 3's shapes. A head size of 128 (64 in the 1B) and 8 KV heads, as the real ones have.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 512, "layers": 4, "heads": 8, "kv_heads": 2, "wide": 1024, "vocabulary": 512},
    "llama1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "wide": 8192, "tied": True},
    "llama3b": {"hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "wide": 8192, "tied": True},
    "llama8b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "wide": 14336},
}
_VOCABULARY = 128256
_LAYERS_A_FILE = 8
_BEGIN, _END = 256, 257  # ids of the special tokens; below them the 256 bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="GEOMETRY:FOLDER", help=f"of {', '.join(GEOMETRIES)}")
    for model in parser.parse_args().models:
        geometry, _, folder = model.partition(":")
        if geometry not in GEOMETRIES or not folder:
            sys.exit(f"{model}: write GEOMETRY:FOLDER with a geometry of {', '.join(GEOMETRIES)}")
        write_model(geometry, Path(folder))


def write_model(geometry: str, folder: Path) -> None:
    """Does nothing if the folder is complete (its index is written last)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shape = GEOMETRIES[geometry]
    config = _config(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_tokenizer(folder)
    where: dict[str, str] = {}
    for name, tensors in _files(shape, config["vocab_size"], seed=zlib.crc32(folder.name.encode())):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    print(f"made {folder} ({geometry})", flush=True)


def _config(shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["hidden"] // shape["heads"],
        "intermediate_size": shape["wide"],
        "vocab_size": shape.get("vocabulary", _VOCABULARY),
        "tie_word_embeddings": shape.get("tied", False),
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": _BEGIN,
        "eos_token_id": _END,
    }


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {character: number for number, character in enumerate(alphabet)} | {"<s>": _BEGIN, "</s>": _END}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)


def _files(shape: dict[str, Any], vocabulary: int, seed: int) -> Any:
    """(file name, its tensors) one after the other, so that no more than one file is in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(seed)
    hidden, wide = shape["hidden"], shape["wide"]
    kv_width = shape["kv_heads"] * (hidden // shape["heads"])

    def weights(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=random, device=device, dtype=torch.bfloat16)
        return (values * 0.02).cpu()

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    ends = {"model.embed_tokens.weight": weights(vocabulary, hidden), "model.norm.weight": ones()}
    if not shape.get("tied", False):
        ends["lm_head.weight"] = weights(vocabulary, hidden)
    yield "model-00000.safetensors", ends
    for start in range(0, shape["layers"], _LAYERS_A_FILE):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(start, min(start + _LAYERS_A_FILE, shape["layers"])):
            at = f"model.layers.{layer}."
            tensors |= {
                f"{at}self_attn.q_proj.weight": weights(hidden, hidden),
                f"{at}self_attn.k_proj.weight": weights(kv_width, hidden),
                f"{at}self_attn.v_proj.weight": weights(kv_width, hidden),
                f"{at}self_attn.o_proj.weight": weights(hidden, hidden),
                f"{at}mlp.gate_proj.weight": weights(wide, hidden),
                f"{at}mlp.up_proj.weight": weights(wide, hidden),
                f"{at}mlp.down_proj.weight": weights(hidden, wide),
                f"{at}input_layernorm.weight": ones(),
                f"{at}post_attention_layernorm.weight": ones(),
            }
        yield f"model-{start + 1:05d}.safetensors", tensors


if __name__ == "__main__":
    main()
