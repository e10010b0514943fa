"""Every place where we reach into SGLang, with the signature that we rely on; attached, then proven.

SGLang logs a hook that does not attach and starts anyway (srt/plugins/hook_registry.py:165), so ``prove_hooks``
looks at what was attached and refuses to go on without it. A renamed method or a new parameter is found by
``check_signatures`` before anything is attached, and by tests/engine/test_seams.py before a release.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
from setproctitle import getproctitle, setproctitle
from sglang.srt.model_executor.model_runner import EagerRunner
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from prism_sgl.engine import deadlines, sleep_wake
from prism_sgl.engine.kv_pool import ElasticKVPool
from prism_sgl.engine.runtime_memory import START_TIMEOUT_S, RuntimeMemory, ShortageError
from prism_sgl.engine.slots import build_allocator
from prism_sgl.engine.support import refuse_other_pools, refuse_unsupported_model
from prism_sgl.engine.weights_loading import hold_weights, image_memory
from prism_sgl.errors import SeamError

SGLANG_VERSION = "0.5.17"


@dataclass(frozen=True)
class Seam:
    """One hook: target, how, our function, and the parameter names of SGLang's own."""

    target: str
    kind: HookType
    hook: Callable[..., Any]
    parameters: tuple[str, ...]


def _profile_available_bytes(
    original: Callable[..., int], configurator: Any, *args: Any, **kwargs: Any
) -> int:
    """The pool is as large as its ceiling, whatever happens to be free while the engine starts."""
    return RuntimeMemory.current().kv_ceiling_bytes


def _token_info(result: Any, observer: Any) -> Any:
    """SGLang's leak check and metrics count the whole range; the lease is our own number."""
    virtual = observer.token_to_kv_pool_allocator.virtual_available_size()
    used = observer.max_total_num_tokens - virtual - result.full_evictable_size
    return dataclasses.replace(
        result,
        full_available_size=virtual,
        full_num_used=used,
        full_token_usage=used / observer.max_total_num_tokens,
    )


def _build_pool(original: Callable[..., Any], configurator: Any, *, sizes: Any, **rest: Any) -> Any:
    """Whatever pool SGLang would choose (kv_cache_configurator.py:839): ours, or none."""
    refuse_other_pools(configurator, RuntimeMemory.current().spec.model, **rest)
    return configurator._build_mha_kv_pool(
        max_total_num_tokens=sizes.max_total_num_tokens, mha_pool_class=ElasticKVPool
    )


def _build_allocator(original: Callable[..., Any], configurator: Any, **kwargs: Any) -> Any:
    return build_allocator(
        kwargs["sizes"].max_total_num_tokens,
        page_size=configurator.pool_page_size,
        dtype=configurator.kv_cache_dtype,
        device=configurator.device,
        kvcache=kwargs["token_to_kv_pool"],
    )


def _load_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    memory = RuntimeMemory.current()
    refuse_unsupported_model(kwargs["model_config"], memory.spec.model)
    # SGLang loads into memory of its own; what it will take is leased before, and page by page becomes the arena's.
    if not memory.overhead.settle(memory.spec.weights_bytes, START_TIMEOUT_S):
        raise ShortageError(f"{memory.spec.model}: no room to load on {memory.spec.device}")
    free_memory = image_memory(kwargs["server_args"])
    try:
        loaded = original(*args, **kwargs)
        hold_weights(loaded.model, kwargs["server_args"], free_memory)
    finally:
        free_memory.close()
    return loaded


def _forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    arrival = RuntimeMemory.current().arrival
    if arrival is not None and arrival.under_way:
        graphs = runner.prefill_cuda_graph_runner
        eager = forward_batch.forward_mode.is_extend() and (graphs is None or isinstance(graphs, EagerRunner))
        arrival.before_pass(eager=eager)
    return original(runner, forward_batch, *args, **kwargs)


def _next_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    point = RuntimeMemory.current().safe_point
    assert point is not None, "the scheduler runs before it is complete"
    return point.next_batch(original, running_batch, last_batch)


def _new_prefill(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    point = RuntimeMemory.current().safe_point
    assert point is not None
    return point.new_prefill(original, running_batch)


def _register_bell(result: Any, scheduler: Any) -> None:
    """An idle engine sleeps in a poll; a neighbour's doorbell must wake it."""
    # Incoming only: a datagram socket can always be written, and the default would never let the poll sleep.
    scheduler.idle_sleeper.poller.register(RuntimeMemory.current().bell.fileno(), zmq.POLLIN)


def _retract_decode(original: Callable[..., Any], batch: Any, server_args: Any) -> Any:
    """SGLang aborts the last request that does not fit; wait for our floor first, which holds it."""
    point = RuntimeMemory.current().safe_point
    assert point is not None
    longest = max(len(r.origin_input_ids) + len(r.output_ids) for r in batch.reqs)
    point.ensure_usable(longest + 3 * point.allocator.page_size)
    return original(batch, server_args)


def _batch_done(result: Any, scheduler: Any, batch: Any, _batch_result: Any) -> None:
    """A request whose first token has just come out has one output token; a chunk that is not the last, none."""
    if batch.forward_mode.is_extend():
        first = sum(len(request.output_ids) == 1 for request in batch.reqs)
        if first:
            RuntimeMemory.current().first_tokens.add(first)


def _init_info(result: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """The engine is complete: bind it to its memory; the facts travel to the worker with SGLang's own answer."""
    facts = sleep_wake.bind(scheduler)
    # For ps and nvidia-smi: SGLang calls every model's engine the same.
    setproctitle(f"{getproctitle()} {RuntimeMemory.current().spec.runtime}")
    return {**result, "prism": msgspec.to_builtins(facts)}


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_LOADING = "sglang.srt.model_executor.model_runner_components.load_model_utils"
_OBSERVER = "sglang.srt.managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver"

SEAMS: tuple[Seam, ...] = (
    Seam(
        f"{_CONFIGURATOR}._profile_available_bytes",
        HookType.AROUND,
        _profile_available_bytes,
        ("self", "pre_model_load_memory"),
    ),
    Seam(
        f"{_CONFIGURATOR}._build_token_to_kv_pool",
        HookType.AROUND,
        _build_pool,
        ("self", "sizes", "is_dsa_model", "is_dsv4_model", "req_to_token_pool"),
    ),
    Seam(
        f"{_CONFIGURATOR}._build_token_to_kv_pool_allocator",
        HookType.AROUND,
        _build_allocator,
        (
            "self",
            "sizes",
            "token_to_kv_pool",
            "is_dsv4_model",
            "req_to_token_pool",
            "token_to_kv_pool_allocator",
        ),
    ),
    Seam(f"{_OBSERVER}._get_token_info", HookType.AFTER, _token_info, ("self",)),
    Seam(
        f"{_LOADING}.load_model_with_memory_saver",
        HookType.AROUND,
        _load_model,
        (
            "server_args",
            "model_config",
            "load_config",
            "device",
            "gpu_id",
            "memory_saver_adapter",
            "is_draft_worker",
        ),
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        HookType.AROUND,
        _forward,
        (
            "self",
            "forward_batch",
            "skip_attn_backend_init",
            "pp_proxy_tensors",
            "reinit_attn_backend",
            "split_forward_count",
        ),
    ),
    Seam(
        f"{_SCHEDULER}.get_next_batch_to_run",
        HookType.AROUND,
        _next_batch,
        ("self", "running_batch", "last_batch"),
    ),
    Seam(
        f"{_SCHEDULER}.get_new_batch_prefill",
        HookType.AROUND,
        _new_prefill,
        ("self", "running_batch"),
    ),
    Seam(f"{_SCHEDULER}.init_idle_sleeper", HookType.AFTER, _register_bell, ("self",)),
    Seam(f"{_SCHEDULER}.get_init_info", HookType.AFTER, _init_info, ("self",)),
    Seam(f"{_SCHEDULER}.process_batch_result", HookType.AFTER, _batch_done, ("self", "batch", "result")),
    Seam(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.retract_decode",
        HookType.AROUND,
        _retract_decode,
        ("self", "server_args"),
    ),
    Seam(
        "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority",
        HookType.AROUND,
        deadlines.calc_priority,
        ("self", "waiting_queue", "running_batch"),
    ),
    Seam(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        HookType.AFTER,
        deadlines.attach,
        (
            "self",
            "obj",
            "input_text",
            "input_ids",
            "input_embeds",
            "mm_inputs",
            "token_type_ids",
        ),
    ),
)

# Methods of SGLang that we call and that are not public, with their parameters.
CALLED: dict[str, tuple[str, ...]] = {
    "sglang.srt.managers.scheduler.run_scheduler_process": (
        "server_args",
        "port_args",
        "gpu_id",
        "tp_rank",
        "attn_cp_rank",
        "moe_dp_rank",
        "moe_ep_rank",
        "pp_rank",
        "dp_rank",
        "pipe_writer",
        "display_tp_rank",
        "display_dp_rank",
        "display_moe_ep_rank",
    ),
    "sglang.srt.entrypoints.engine._wait_for_scheduler_ready": (
        "scheduler_pipe_readers",
        "scheduler_procs",
    ),
    f"{_CONFIGURATOR}._build_mha_kv_pool": ("self", "max_total_num_tokens", "mha_pool_class", "quant_method"),
    "sglang.srt.mem_cache.radix_cache.RadixCache._split_node": ("self", "key", "child", "split_len"),
    "sglang.srt.mem_cache.radix_cache.RadixCache._delete_leaf": ("self", "node"),
    "sglang.srt.mem_cache.radix_cache.RadixCache._record_remove_event": ("self", "node", "medium"),
    "sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order": ("reqs", "server_args"),
    "sglang.srt.managers.schedule_batch.ScheduleBatch.release_req": (
        "self",
        "idx",
        "remaing_req_count",
        "server_args",
    ),
    f"{_SCHEDULER}.handle_rpc_request": ("self", "recv_req"),
    f"{_SCHEDULER}.flush_cache": ("self", "empty_cache"),
    f"{_SCHEDULER}.pause_generation": ("self", "recv_req"),
    f"{_SCHEDULER}.continue_generation": ("self", "recv_req"),
    f"{_SCHEDULER}.maybe_sleep_on_idle": ("self",),
    f"{_SCHEDULER}.is_fully_idle": ("self", "for_health_check"),
}

# Set on Scheduler for its rpc (handle_rpc_request runs methods by name).
RPC_METHODS: dict[str, Callable[..., None]] = {
    "prism_sleep": sleep_wake.prism_sleep,
    "prism_wake": sleep_wake.prism_wake,
    "prism_quota": sleep_wake.prism_quota,
}


def register_hooks() -> None:
    """Check every signature, then hand the hooks to SGLang's registry.

    Raises:
        SeamError: SGLang is of another version, or a method that we hook or call has changed.
    """
    check_signatures()
    for seam in SEAMS:
        HookRegistry.register(seam.target, seam.hook, seam.kind)
    scheduler = pkgutil.resolve_name(_SCHEDULER)
    for name, method in RPC_METHODS.items():
        setattr(scheduler, name, method)


def check_signatures() -> None:
    """Every seam is as it was when this code was written, in SGLang as it is installed now."""
    version = importlib.metadata.version("sglang")
    if version != SGLANG_VERSION:
        raise SeamError(
            f"SGLang {version} is installed; this release knows the seams of {SGLANG_VERSION} only"
        )
    expected = {seam.target: seam.parameters for seam in SEAMS} | CALLED
    for target, parameters in expected.items():
        if target in HookRegistry._patched:
            continue
        found = tuple(inspect.signature(pkgutil.resolve_name(target)).parameters)
        if found != parameters:
            raise SeamError(f"{target} takes {found}, expected {parameters}")


def prove_hooks() -> None:
    """Called in each SGLang process after its plugins are loaded: all hooks hold, or the process ends.

    Raises:
        SeamError: names what is missing.
    """
    missing = [seam.target for seam in SEAMS if seam.target not in HookRegistry._patched]
    scheduler = pkgutil.resolve_name(_SCHEDULER)
    missing += [name for name, method in RPC_METHODS.items() if getattr(scheduler, name, None) is not method]
    if missing:
        raise SeamError(f"hooks did not attach: {', '.join(missing)}; see SGLang's log above for the reason")
