"""What runs on elastic memory and what is refused at start, by name. The README's support table is this list."""

from __future__ import annotations

from typing import Any

from prism_sgl.errors import UnsupportedModelError

# (ServerArgs field, values that are fine, what to say)
_REFUSED_OPTIONS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("tp_size", (1,), "tensor parallelism: the ranks would have to agree on every page"),
    ("pp_size", (1,), "pipeline parallelism"),
    ("dp_size", (1,), "data parallelism inside one engine; configure the model on several devices instead"),
    ("dcp_size", (1, None), "decode context parallelism"),
    ("enable_lora", (False, None), "LoRA adapters: their weights lie outside the arena"),
    ("speculative_algorithm", (None,), "speculative decoding: the draft model's pool is not elastic"),
    ("enable_hierarchical_cache", (False,), "HiCache: its kernels assume SGLang's own KV layout"),
    ("disaggregation_mode", ("null", None), "prefill/decode disaggregation"),
    ("enable_memory_saver", (False,), "torch_memory_saver: sleep and wake are ours"),
    ("weight_cache_mode", ("off",), "SGLang's weight cache daemon: images are ours"),
    ("enable_unified_memory", (False,), "SGLang's unified memory pool"),
    ("kv_cache_dtype", ("auto", "bf16", "bfloat16"), "a KV cache of another type than the model's"),
    ("tokenizer_worker_num", (1,), "several tokenizer workers: the app runs inside our worker"),
)


def refuse_unsupported_options(server_args: Any, model: str) -> None:
    """Raises UnsupportedModelError naming the model, the option and the reason."""
    for option, fine, reason in _REFUSED_OPTIONS:
        value = getattr(server_args, option, fine[0])
        if value not in fine:
            raise UnsupportedModelError(
                f"{model}: engine_args.{option} = {value!r} is not supported on elastic memory ({reason})"
            )


def refuse_unsupported_model(model_config: Any, model: str) -> None:
    """Raises UnsupportedModelError for attention kinds without an elastic pool.

    Must be asked before pools are built: SGLang's out-of-tree path would give a sliding-window model a plain
    MHA pool in silence (kv_cache_configurator.py:868).
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


def _is_hybrid_linear(model_config: Any) -> bool:
    text = model_config.hf_text_config
    return any(
        getattr(text, name, None) for name in ("linear_num_key_heads", "mamba_d_state", "linear_attn_config")
    )
