"""What runs on elastic memory and what is refused at start, by name. The README's support table is this list."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.configs.model_config import AttentionArch, is_minimax_sparse
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.utils.common import is_float4_e2m1fn_x2

from prism_sgl.errors import UnsupportedModelError

# (ServerArgs field, values that are fine, what to say)
_REFUSED_OPTIONS: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("device", ("cuda", "cpu"), "neither a card with CUDA nor the host"),
    ("tp_size", (1,), "tensor parallelism: the ranks would have to agree on every page"),
    ("pp_size", (1,), "pipeline parallelism"),
    ("dp_size", (1,), "data parallelism inside one engine; configure the model on several devices instead"),
    ("nnodes", (1,), "one engine over several hosts"),
    ("ep_join_mode", (None,), "ranks that join a running engine"),
    ("dcp_size", (1, None), "decode context parallelism"),
    ("enable_lora", (False, None), "LoRA adapters: their weights lie outside the arena"),
    ("speculative_algorithm", (None,), "speculative decoding: the draft model's pool is not elastic"),
    ("enable_hierarchical_cache", (False,), "HiCache: its kernels assume SGLang's own KV layout"),
    ("enable_lmcache", (False,), "LMCache: it copies KV by addresses that come and go"),
    ("enable_flexkv", (False,), "FlexKV: it copies KV by addresses that come and go"),
    (
        "radix_cache_backend",
        (None,),
        "a prefix cache other than SGLang's RadixCache, whose nodes reclaim cuts",
    ),
    ("cpu_offload_gb", (0,), "weights offloaded to the host lie outside the arena"),
    ("offload_group_size", (-1, 0), "weights offloaded to the host lie outside the arena"),
    ("disaggregation_mode", ("null", None), "prefill/decode disaggregation"),
    ("enable_pdmux", (False,), "prefill/decode multiplexing: its own loop never comes to our safe point"),
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
    ("kv_canary", ("none",), "the KV canary: its rows lie beside every slot, outside the lease"),
    (
        "enable_two_batch_overlap",
        (False,),
        "two-batch overlap: its layers would not wait for their weights in a wake",
    ),
    ("tokenizer_worker_num", (1,), "several tokenizer workers: the app runs inside our worker"),
)
# Attention kernels that have been run on mapped pages, by SGLang's name of the device.
_KERNELS = {"cuda": ("fa3", "triton", "flashinfer"), "cpu": ("torch_native",)}
_KERNEL_OPTIONS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def refuse_unsupported_options(server_args: Any, model: str) -> None:
    """Raises UnsupportedModelError naming the model, the option and the reason.

    ``server_args``: as SGLang has resolved them, so that what it chooses for a card by itself is seen too.
    """
    for option, fine, reason in _REFUSED_OPTIONS:
        value = getattr(server_args, option)
        if value not in fine:
            raise UnsupportedModelError(
                f"{model}: engine_args.{option} = {value!r} is not supported on elastic memory ({reason})"
            )
    dtype = server_args.kv_cache_dtype
    if server_args.device == "cpu" and dtype.startswith("fp8"):
        raise UnsupportedModelError(
            f"{model}: engine_args.kv_cache_dtype = {dtype!r} needs a device of kind cuda"
        )
    _refuse_other_kernels(server_args, model)
    block_tokens = server_args.page_size
    if block_tokens & (block_tokens - 1):  # or SGLang's Triton kernels would fail in the first prefill
        raise UnsupportedModelError(
            f"{model}: block_tokens = {block_tokens} is not supported: SGLang's kernels take powers of two"
        )


def _refuse_other_kernels(server_args: Any, model: str) -> None:
    """On Blackwell SGLang takes trtllm_mha (or fa4) where nothing is said, and other block sizes with it."""
    known = _KERNELS[server_args.device]
    for option in _KERNEL_OPTIONS:
        value = getattr(server_args, option)
        if value is not None and value not in known:
            raise UnsupportedModelError(
                f"{model}: engine_args.{option} = {value!r} (given, or chosen by SGLang) is not supported on "
                f"elastic memory (not tested on mapped pages); give {' or '.join(map(repr, known))}"
            )


def refuse_unsupported_model(model_config: Any, model: str) -> None:
    """Raises UnsupportedModelError for attention kinds without an elastic pool.

    Asked before anything is loaded. What the model's configuration does not show, ``refuse_other_pools`` sees. A
    sliding window alone is fine: outside ``is_hybrid_swa``, SGLang keeps every token in a plain MHA pool, frees none
    early, and the window is a mask in the kernels (Mistral, Gemma 2 and 3, Phi 3).
    """
    architecture = (model_config.hf_config.architectures or ["?"])[0]
    kinds = {
        "multi-head latent attention (MLA)": model_config.attention_arch == AttentionArch.MLA,
        "sliding-window attention with a pool of its own": model_config.is_hybrid_swa,
        "linear or hybrid attention": mambaish_config(model_config) is not None,
        "an encoder": model_config.is_encoder_decoder,
    }
    for kind, present in kinds.items():
        if present:
            raise UnsupportedModelError(
                f"{model}: {architecture} has {kind}, which has no elastic pool yet; "
                "serve a model with plain MHA or GQA attention"
            )


def refuse_other_prefix_cache(tree: Any, model: str) -> None:
    """Raises UnsupportedModelError for one whose nodes a reclaim cannot cut (page_eviction.py).

    SGLang's environment chooses among them as well (mem_cache/registry.py:97), and no option shows it.
    """
    if type(tree) not in (RadixCache, ChunkCache):
        raise UnsupportedModelError(
            f"{model}: {type(tree).__name__} is not supported on elastic memory; "
            "unset SGLANG_EXPERIMENTAL_CPP_RADIX_TREE and SGLANG_ENABLE_UNIFIED_RADIX_TREE"
        )


def refuse_other_pools(
    configurator: Any, model: str, *, is_dsa_model: bool, is_dsv4_model: bool, req_to_token_pool: Any
) -> None:
    """Raises UnsupportedModelError where SGLang would build another pool than plain MHA.

    In its own order (kv_cache_configurator.py:839), so that the kind that is named is the one that it would build.
    """
    hybrid = bool(configurator.mambaish_config)
    other = {
        "DeepSeek V4's pool": is_dsv4_model,
        "sparse attention (DSA)": is_dsa_model,
        "multi-head latent attention (MLA)": configurator.use_mla_backend and not hybrid,
        "sliding-window attention with a pool of its own": configurator.is_hybrid_swa,
        "MiniMax's sparse attention": is_minimax_sparse(configurator.model_config.hf_config),
        "linear or hybrid attention": hybrid,
        "a 4-bit KV cache": is_float4_e2m1fn_x2(configurator.kv_cache_dtype),
        "an MXFP8 KV cache": configurator.kv_cache_dtype_str == "mxfp8",
        "a KV cache sized after capture": configurator.post_capture_kv_active,
    }
    for kind, present in other.items():
        if present:
            raise UnsupportedModelError(f"{model}: {kind} has no elastic pool yet; serve a model without it")
