"""What cannot run on elastic memory is refused by name, never run with a stock pool in silence.

Configurations and SGLang's choices are its own, so that a name that it changes fails here and not at a user's.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.server_args as sglang_args
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import common

from prism_sgl.engine import support
from prism_sgl.engine.support import (
    refuse_other_pools,
    refuse_other_prefix_cache,
    refuse_unsupported_model,
    refuse_unsupported_options,
)
from prism_sgl.errors import UnsupportedModelError

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
_WINDOW = {"head_dim": 16, "sliding_window": 64}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_WHISPER = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "max_target_positions": 448}
_MLLAMA = {"text_config": {**_SIZES, "cross_attention_layers": [1]}, "vision_config": {}}


def model_config(folder: Path, architecture: str, model_type: str, fields: dict[str, Any]) -> ModelConfig:
    content = {**_SIZES, "architectures": [architecture], "model_type": model_type, **fields}
    (folder / "config.json").write_text(json.dumps(content))
    return ModelConfig(str(folder))


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("architecture", "model_type", "fields"),
    [
        ("LlamaForCausalLM", "llama", {}),
        ("Qwen2ForCausalLM", "qwen2", {}),
        ("Qwen3ForCausalLM", "qwen3", {"head_dim": 16}),
        ("Qwen3MoeForCausalLM", "qwen3_moe", {"head_dim": 16}),
        # A window that is a mask: every token stays in the plain pool.
        ("MistralForCausalLM", "mistral", _WINDOW),
        ("Gemma2ForCausalLM", "gemma2", _WINDOW),
        ("Gemma3ForCausalLM", "gemma3_text", _WINDOW),
        ("Phi3ForCausalLM", "phi3", _WINDOW),
    ],
)
def test_a_plain_model_passes(
    tmp_path: Path, architecture: str, model_type: str, fields: dict[str, Any]
) -> None:
    refuse_unsupported_model(model_config(tmp_path, architecture, model_type, fields), "chat")


@pytest.mark.parametrize(
    ("architecture", "model_type", "fields", "kind"),
    [
        ("DeepseekV2ForCausalLM", "deepseek_v2", {**_LATENT, "v_head_dim": 16}, "latent attention (MLA)"),
        ("NemotronHForCausalLM", "nemotron_h", {"hybrid_override_pattern": "M*M-"}, "linear or hybrid"),
        ("Lfm2ForCausalLM", "lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "linear or hybrid"),
        ("Qwen3NextForCausalLM", "qwen3_next", {"head_dim": 16}, "linear or hybrid"),
        ("FalconH1ForCausalLM", "falcon_h1", {}, "linear or hybrid"),
        ("GptOssForCausalLM", "gpt_oss", {**_WINDOW, **_ALTERNATING}, "sliding-window"),
        ("Gemma4ForCausalLM", "gemma4_text", {**_WINDOW, **_ALTERNATING}, "sliding-window"),
        ("WhisperForConditionalGeneration", "whisper", _WHISPER, "an encoder"),
        ("MllamaForConditionalGeneration", "mllama", _MLLAMA, "an encoder"),
    ],
)
def test_a_model_without_an_elastic_pool_is_named(
    tmp_path: Path, architecture: str, model_type: str, fields: dict[str, Any], kind: str
) -> None:
    config = model_config(tmp_path, architecture, model_type, fields)
    with pytest.raises(UnsupportedModelError) as refused:
        refuse_unsupported_model(config, "chat")
    message = str(refused.value)
    assert message.startswith(f"chat: {architecture} has ") and kind in message
    assert "\n" not in message


# ---------------------------------------------------------------- pools

# SGLang's method that builds a pool -> what we call it. The others are of devices that we do not have.
_POOLS = {
    "_build_dsv4_kv_pool": "DeepSeek V4's pool",
    "_build_dsa_kv_pool": "sparse attention (DSA)",
    "_build_mla_kv_pool": "multi-head latent attention (MLA)",
    "_build_mla_fp4_kv_pool": "multi-head latent attention (MLA)",
    "_build_hybrid_swa_kv_pool": "sliding-window attention",
    "_build_minimax_sparse_kv_pool": "MiniMax's sparse attention",
    "_build_hybrid_linear_kv_pool": "linear or hybrid attention",
}


def configurator(**fields: object) -> KVCacheConfigurator:
    """SGLang's own, of a plain model; it has slots, so that a field of another name is an error."""
    made = KVCacheConfigurator.__new__(KVCacheConfigurator)
    plain = {
        "server_args": SimpleNamespace(attention_backend="fa3"),
        "model_config": SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"])),
        "layer_info": SimpleNamespace(num_effective_layers=4),
        "kv_cache_dtype": torch.bfloat16,
        "kv_cache_dtype_str": "auto",
        "use_mla_backend": False,
        "is_hybrid_swa": False,
        "mambaish_config": None,
        "post_capture_kv_active": False,
    }
    for name, value in {**plain, **fields}.items():
        setattr(made, name, value)
    return made


def refusal(made: KVCacheConfigurator, *, dsa: bool = False, dsv4: bool = False) -> str | None:
    try:
        refuse_other_pools(made, "chat", is_dsa_model=dsa, is_dsv4_model=dsv4, req_to_token_pool=None)
    except UnsupportedModelError as refused:
        return str(refused)
    return None


def test_every_pool_that_sglang_would_build_is_refused_under_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All its cases, in its own order of tests: ours names what SGLang's own method would have built."""
    monkeypatch.setattr(common, "is_cuda", lambda: True)
    features = SimpleNamespace(enable_page_major_kv_layout=False)
    monkeypatch.setattr(kv_cache_configurator, "get_memory", lambda: features)
    monkeypatch.setattr(
        kv_cache_configurator, "current_platform", SimpleNamespace(is_out_of_tree=lambda: False)
    )

    def builds(name: str) -> Callable[..., str]:
        return lambda self, **rest: "a 4-bit" if rest.get("quant_method") else _POOLS.get(name, "plain")

    for name in [*_POOLS, "_build_mha_kv_pool"]:
        monkeypatch.setattr(KVCacheConfigurator, name, builds(name))
    monkeypatch.setattr(KVCacheConfigurator, "_build_fp4_quant_method", lambda self, num_layers: "nvfp4")
    sizes = kv_cache_configurator._PoolSizes(
        **dict.fromkeys(kv_cache_configurator._PoolSizes.__struct_fields__, 0)
    )
    minimax = SimpleNamespace(hf_config=SimpleNamespace(architectures=["MiniMaxM3SparseForCausalLM"]))
    seen = set()
    for dsv4, dsa, mla, swa, sparse, hybrid, four_bit in itertools.product((False, True), repeat=7):
        if dsa and (not mla or dsv4):  # there are no such models
            continue
        made = configurator(
            use_mla_backend=mla,
            is_hybrid_swa=swa,
            **{"mambaish_config": SimpleNamespace()} if hybrid else {},
            **{"model_config": minimax} if sparse else {},
            **{"kv_cache_dtype": torch.float4_e2m1fn_x2} if four_bit else {},
        )
        theirs = made._build_token_to_kv_pool(
            sizes=sizes, is_dsa_model=dsa, is_dsv4_model=dsv4, req_to_token_pool=None
        )
        seen.add(theirs)
        ours = refusal(made, dsa=dsa, dsv4=dsv4)
        if theirs == "plain":
            assert ours is None
        else:
            assert ours is not None and ours.startswith(f"chat: {theirs}") and "\n" not in ours, theirs
    assert seen == {*_POOLS.values(), "a 4-bit", "plain"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"kv_cache_dtype_str": "mxfp8"}, "MXFP8"), ({"post_capture_kv_active": True}, "after capture")],
)
def test_a_pool_that_is_a_variant_of_the_plain_one_is_refused(fields: dict[str, object], kind: str) -> None:
    assert refusal(configurator()) is None
    message = refusal(configurator(**fields))
    assert message is not None and message.startswith("chat: ") and kind in message


# ---------------------------------------------------------------- options


def arguments(**options: object) -> SimpleNamespace:
    """SGLang's defaults, and what it makes of them on a card."""
    defaults = {field.name: field.default for field in dataclasses.fields(ServerArgs)}
    assert options.keys() <= defaults.keys()
    return SimpleNamespace(**{**defaults, "device": "cuda", "page_size": 1, **options})


@pytest.fixture
def resolved(tmp_path: Path) -> Callable[..., ServerArgs]:
    """Makes SGLang's real arguments, with all that it decides by itself."""
    model_config(tmp_path, "LlamaForCausalLM", "llama", {})
    return lambda **options: ServerArgs(model_path=str(tmp_path), skip_tokenizer_init=True, **options)


def test_every_option_that_we_look_at_is_one_of_sglangs_and_off_by_default() -> None:
    plain = arguments(attention_backend="fa3")
    refuse_unsupported_options(plain, "chat")
    for option, fine, _ in support._REFUSED_OPTIONS:
        assert getattr(plain, option) in fine
    assert {"device", "page_size", *support._KERNEL_OPTIONS} <= vars(plain).keys()
    assert {kernel for known in support._KERNELS.values() for kernel in known} <= {
        *sglang_args.ATTENTION_BACKEND_CHOICES
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "xpu"),
        ("tp_size", 2),
        ("nnodes", 2),
        ("ep_join_mode", "scale"),
        ("enable_lora", True),
        ("speculative_algorithm", "EAGLE"),
        ("enable_hierarchical_cache", True),
        ("enable_lmcache", True),
        ("enable_flexkv", True),
        ("radix_cache_backend", "mine"),
        ("cpu_offload_gb", 4),
        ("offload_group_size", 2),
        ("disaggregation_mode", "prefill"),
        ("enable_pdmux", True),
        ("enable_memory_saver", True),
        ("kv_cache_dtype", "fp4_e2m1"),
        ("kv_canary", "log"),
        ("attention_backend", "trtllm_mha"),
        ("attention_backend", "fa4"),
        ("attention_backend", "torch_native"),
        ("prefill_attention_backend", "flex_attention"),
        ("decode_attention_backend", "hpc_ops"),
    ],
)
def test_an_unsupported_option_is_named(option: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        refuse_unsupported_options(arguments(**{option: value}), "chat")
    message = str(refused.value)
    assert message.startswith(f"chat: engine_args.{option} = {value!r} ")
    assert "is not supported on elastic memory (" in message and "\n" not in message


@pytest.mark.parametrize("kernels", ["fa3", "triton", "flashinfer"])
def test_tested_kernels_pass_on_a_card(kernels: str) -> None:
    refuse_unsupported_options(arguments(attention_backend=kernels, kv_cache_dtype="fp8_e4m3"), "chat")
    refuse_unsupported_options(
        arguments(prefill_attention_backend=kernels, decode_attention_backend="triton"), "chat"
    )


@pytest.mark.parametrize(
    ("card", "chosen"),
    [
        ("is_hopper_with_cuda_12_3", "fa3"),
        ("is_flashinfer_available", "flashinfer"),  # Ampere, Ada
        (None, "triton"),
        ("is_sm100_supported", "trtllm_mha"),  # Blackwell
    ],
)
def test_what_sglang_chooses_for_a_card_is_looked_at(
    resolved: Callable[..., ServerArgs], monkeypatch: pytest.MonkeyPatch, card: str | None, chosen: str
) -> None:
    for name in ("is_hopper_with_cuda_12_3", "is_flashinfer_available", "is_sm100_supported"):
        monkeypatch.setattr(sglang_args, name, lambda name=name: name == card)
    args = resolved(device="cuda", page_size=16)
    assert args.attention_backend == chosen
    if chosen == "trtllm_mha":
        with pytest.raises(
            UnsupportedModelError, match=r"chosen by SGLang.*'fa3' or 'triton' or 'flashinfer'"
        ):
            refuse_unsupported_options(args, "chat")
    else:
        refuse_unsupported_options(args, "chat")


def test_the_host_has_torchs_kernels(resolved: Callable[..., ServerArgs]) -> None:
    host: dict[str, object] = {
        "device": "cpu",
        "sampling_backend": "pytorch",
        "grammar_backend": "llguidance",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
    }
    args = resolved(attention_backend="torch_native", **host)
    refuse_unsupported_options(args, "chat")
    with pytest.raises(UnsupportedModelError, match=r"decode_attention_backend = 'triton'.*'torch_native'"):
        refuse_unsupported_options(resolved(decode_attention_backend="triton", **host), "chat")


def test_fp8_kv_needs_a_card() -> None:
    with pytest.raises(UnsupportedModelError, match="needs a device of kind cuda"):
        refuse_unsupported_options(arguments(device="cpu", kv_cache_dtype="fp8_e4m3"), "chat")


@pytest.mark.parametrize("block_tokens", [1, 2, 16, 64, 1024])
def test_blocks_are_powers_of_two(block_tokens: int) -> None:
    refuse_unsupported_options(arguments(page_size=block_tokens), "chat")
    if block_tokens > 2:
        with pytest.raises(UnsupportedModelError, match=f"chat: block_tokens = {block_tokens - 1} "):
            refuse_unsupported_options(arguments(page_size=block_tokens - 1), "chat")


def test_a_prefix_cache_that_the_environment_chose_is_refused_by_name() -> None:
    """No option shows it, so it is known by its class once it is built."""
    for known in (RadixCache.create_simulated(), object.__new__(ChunkCache)):
        refuse_other_prefix_cache(known, "chat")
    with pytest.raises(UnsupportedModelError, match=r"^chat: UnifiedRadixCache is not supported"):
        refuse_other_prefix_cache(object.__new__(UnifiedRadixCache), "chat")
