"""Facts from a model's files, without any of its weights being read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism_sgl.model_files import ModelFacts, read_cached_facts, read_facts
from tests.model_folders import write_model, write_safetensors

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(
        tmp_path / "model", weights_bytes=3 * MIB, layers=30, kv_heads=3, head_dim=64, context=8192
    )


def change_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_weights_are_whole_granules_and_kv_counts_all_layers(folder: Path) -> None:
    facts = read_facts(folder, {})
    assert facts == ModelFacts(weights_bytes=4 * MIB, kv_bytes_per_token=23040, context_tokens=8192)


def test_context_and_kv_dtype_of_the_engine_arguments_win(folder: Path) -> None:
    facts = read_facts(folder, {"context_length": 2048, "kv_cache_dtype": "fp8_e4m3"})
    assert (facts.context_tokens, facts.kv_bytes_per_token) == (2048, 11520)


def test_float32_files_are_held_in_half_unless_float32_is_asked_for(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {"w": ("F32", [2 * MIB], 8 * MIB)})
    assert read_facts(folder, {}).weights_bytes == 4 * MIB
    assert read_facts(folder, {"dtype": "float32"}).weights_bytes == 8 * MIB
    assert read_facts(folder, {"dtype": "float32"}).kv_bytes_per_token == 46080


def test_half_files_are_held_in_float32_where_that_is_asked_for(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {"w": ("BF16", [2 * MIB], 4 * MIB)})
    assert read_facts(folder, {}).weights_bytes == 4 * MIB
    assert read_facts(folder, {"dtype": "float32"}).weights_bytes == 8 * MIB


def test_quantised_tensors_count_as_stored(folder: Path) -> None:
    tensors = {"w": ("I8", [6 * MIB], 6 * MIB), "scale": ("F32", [MIB // 2], 2 * MIB)}
    write_safetensors(folder / "model.safetensors", tensors)
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert read_facts(folder, {}).weights_bytes == 8 * MIB


def test_only_files_of_the_index_count(folder: Path) -> None:
    for name in ("a", "b", "unused"):
        write_safetensors(folder / f"{name}.safetensors", {"w": ("BF16", [MIB], 2 * MIB)})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_facts(folder, {}).weights_bytes == 4 * MIB


def test_second_copy_of_the_weights_is_not_counted(folder: Path) -> None:
    write_safetensors(folder / "consolidated.safetensors", {"w": ("BF16", [MIB], 2 * MIB)})
    assert read_facts(folder, {}).weights_bytes == 4 * MIB


def test_head_dim_follows_from_hidden_size(folder: Path) -> None:
    change_config(folder, head_dim=None, hidden_size=576, num_attention_heads=9)
    assert read_facts(folder, {}).kv_bytes_per_token == 23040


def test_text_part_of_a_multimodal_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": config}))
    assert read_facts(folder, {}).kv_bytes_per_token == 23040


def test_latent_attention_is_unknown(folder: Path) -> None:
    change_config(folder, kv_lora_rank=512)
    assert read_facts(folder, {}).kv_bytes_per_token == 0


def test_single_file_counts_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(100))
    assert read_facts(file, {"context_length": 7}) == ModelFacts(weights_bytes=2 * MIB, context_tokens=7)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x05" + bytes(7) + b"{"]
)
def test_broken_safetensors_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_facts(folder, {})


def test_broken_header_entry_is_named(folder: Path) -> None:
    text = json.dumps({"w": {"dtype": "BF16"}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="broken header at 'w'"):
        read_facts(folder, {})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_is_too_deep_is_named(folder: Path, name: str) -> None:
    text = b'{"a":' * 100_000
    begin = len(text).to_bytes(8, "little") if name.endswith(".safetensors") else b""
    (folder / name).write_bytes(begin + text)
    with pytest.raises(ValueError, match=name):
        read_facts(folder, {})


def test_index_whose_files_are_no_names_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": ["a.safetensors"]}}))
    with pytest.raises(ValueError, match=r"index\.json has no weight_map of file names"):
        read_facts(folder, {})


@pytest.mark.parametrize("path", ["models/my--model", "models/run_3-", "models/chat.git"])
def test_what_is_no_id_of_the_hub_is_a_wrong_value(path: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)repo"):
        read_cached_facts(path, {})
