"""What runs on elastic memory and what is refused at start, by name. The README's support table is this list."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.model_config import is_minimax_sparse
from sglang.srt.utils.common import is_float4_e2m1fn_x2

from prism_sgl.errors import UnsupportedModelError

# (ServerArgs field, values that are fine, what to say)
_REFUSED_OPTIONS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("tp_size", (1,), "tensor parallelism: the ranks would have to agree on every page"),
    ("pp_size", (1,), "pipeline parallelism"),
    ("dp_size", (1,), "data parallelism inside one engine; configure the model on several devices instead"),
    ("nnodes", (1,), "one engine over several hosts"),
    ("ep_join_mode", (None,), "ranks that join a running engine"),
    ("dcp_size", (1, None), "decode context parallelism"),
    ("enable_lora", (False, None), "LoRA adapters: their weights lie outside the arena"),
    ("speculative_algorithm", (None,), "speculative decoding: the draft model's pool is not elastic"),
    ("enable_hierarchical_cache", (False,), "HiCache: its kernels assume SGLang's own KV layout"),
    ("disaggregation_mode", ("null", None), "prefill/decode disaggregation"),
    ("enable_memory_saver", (False,), "torch_memory_saver: sleep and wake are ours"),
    ("weight_cache_mode", ("off",), "SGLang's weight cache daemon: images are ours"),
    ("enable_unified_memory", (False,), "SGLang's unified memory pool"),
    (
        "kv_cache_dtype",
        ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
        "a KV cache with scales of its own",
    ),
    ("enable_page_major_kv_layout", (False,), "SGLang's own page-major layout"),
    ("prefill_only_disable_kv_cache", (False,), "an engine without a KV cache"),
    ("enable_hisparse", (False,), "sparse host caches"),
    ("tokenizer_worker_num", (1,), "several tokenizer workers: the app runs inside our worker"),
)


def refuse_unsupported_options(server_args: Any, model: str) -> None:
    """Raises UnsupportedModelError naming the model, the option and the reason."""
    dtype = getattr(server_args, "kv_cache_dtype", "auto")
    if getattr(server_args, "device", "cuda") == "cpu" and dtype.startswith("fp8"):
        raise UnsupportedModelError(
            f"{model}: engine_args.kv_cache_dtype = {dtype!r} needs a device of kind cuda"
        )
    for option, fine, reason in _REFUSED_OPTIONS:
        value = getattr(server_args, option, fine[0])
        if value not in fine:
            raise UnsupportedModelError(
                f"{model}: engine_args.{option} = {value!r} is not supported on elastic memory ({reason})"
            )


def refuse_unsupported_model(model_config: Any, model: str) -> None:
    """Raises UnsupportedModelError for attention kinds without an elastic pool.

    Asked before anything is loaded. What the model's configuration does not show, ``refuse_other_pools`` sees.
    """
    architecture = (model_config.hf_config.architectures or ["?"])[0]
    kinds = {
        "sliding-window attention": getattr(model_config, "is_hybrid_swa", False),
        "multi-head latent attention (MLA)": str(getattr(model_config, "attention_arch", "")).endswith("MLA"),
        "linear or hybrid attention": _is_hybrid_linear(model_config),
        "an encoder": getattr(model_config, "is_encoder_decoder", False),
    }
    for kind, present in kinds.items():
        if present:
            raise UnsupportedModelError(
                f"{model}: {architecture} has {kind}, which has no elastic pool yet; "
                "serve a model with plain MHA or GQA attention"
            )


def refuse_other_pools(
    configurator: Any, model: str, *, is_dsa_model: bool, is_dsv4_model: bool, req_to_token_pool: Any
) -> None:
    """Raises UnsupportedModelError where SGLang would build another pool than plain MHA (its own order of tests)."""
    other = {
        "DeepSeek V4's pool": is_dsv4_model,
        "sparse attention (DSA)": is_dsa_model,
        "multi-head latent attention (MLA)": configurator.use_mla_backend,
        "sliding-window attention": configurator.is_hybrid_swa,
        "linear or hybrid attention": configurator.mambaish_config,
        "MiniMax's sparse attention": is_minimax_sparse(configurator.model_config.hf_config),
        "a 4-bit KV cache": is_float4_e2m1fn_x2(configurator.kv_cache_dtype),
        "an MXFP8 KV cache": configurator.kv_cache_dtype_str == "mxfp8",
        "a KV cache sized after capture": configurator.post_capture_kv_active,
    }
    for kind, present in other.items():
        if present:
            raise UnsupportedModelError(f"{model}: {kind} has no elastic pool yet; serve a model without it")


def _is_hybrid_linear(model_config: Any) -> bool:
    text = model_config.hf_text_config
    return any(
        getattr(text, name, None) for name in ("linear_num_key_heads", "mamba_d_state", "linear_attn_config")
    )
