"""Starting one unforked SGLang engine for a runtime: its arguments, its child processes, its FastAPI app."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.engine import Engine, SchedulerInitResult, _wait_for_scheduler_ready
from sglang.srt.managers.load_snapshot import shm_path_for
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs

from prism_sgl import addresses
from prism_sgl.engine.early_children import EarlyChildren
from prism_sgl.engine.seams import prove_hooks
from prism_sgl.engine.support import refuse_unsupported_options
from prism_sgl.errors import ConfigError, describe_exit
from prism_sgl.messages import RuntimeFacts, RuntimeSpec

# What every runtime needs, whatever the user asks for.
_ALWAYS: dict[str, object] = {
    "skip_server_warmup": True,  # the stock warm-up wants SGLang's own HTTP port
    "sleep_on_idle": True,  # or an idle engine spins on a core that its neighbours need
    "enable_metrics": False,  # SGLang's gauges need a directory a process; ours come from ledger and router
}
# What SGLang needs on a CPU.
_HOST: dict[str, object] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "grammar_backend": "llguidance",  # xgrammar refuses the CPU
    "mem_fraction_static": 0.5,  # unused: the pool is sized by its ceiling (seams.py)
}
# On a card nothing is set that the user may not change; these are defaults of ours.
_DEFAULTS: dict[str, object] = {"max_running_requests": 32, "log_level": "info"}
_CUDA_DEFAULTS: dict[str, object] = {
    "cuda_graph_max_bs_decode": 32,
    # Half a GiB to 1.5 GiB a model that stays on the card while it sleeps.
    "disable_prefill_cuda_graph": True,
}


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, once it is certain that our hooks hold in it."""
    load_plugins()
    prove_hooks()
    run_scheduler_process(*args, **kwargs)


class RuntimeEngine(Engine):
    """SGLang's Engine with our scheduler entry. Its children are spawned and pay SGLang's imports again."""

    run_scheduler_process_func: Callable[..., None] = staticmethod(run_scheduler)


class ForkingEngine(RuntimeEngine):
    """Children are forked and have the imports already (25 s of one core).

    Safe on the host because nothing has started a thread yet and there is no CUDA context; on a card it is not.
    """

    @classmethod
    def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
        mp.set_start_method("fork", force=True)
        return super()._launch_scheduler_processes(*args, **kwargs)


class EarlyEngine(RuntimeEngine):
    """Children have waited with their imports done (early_children.py), and have proven our hooks."""

    children: ClassVar[EarlyChildren]  # of this process, which has one engine
    run_scheduler_process_func: Callable[..., None] = staticmethod(run_scheduler_process)

    @classmethod
    def _launch_scheduler_processes(
        cls, server_args: ServerArgs, port_args: PortArgs, run_scheduler_process_func: Callable[..., None]
    ) -> tuple[SchedulerInitResult, list[Any]]:
        """As SGLang's for one rank (engine.py:823); support.py has refused every option that needs more."""
        child = cls.children.scheduler
        ranks = ("tp_rank", "attn_cp_rank", "moe_dp_rank", "moe_ep_rank", "pp_rank")
        arguments = {
            "server_args": server_args,
            "port_args": port_args,
            "gpu_id": server_args.base_gpu_id,
            **dict.fromkeys(ranks, 0),
            "dp_rank": None,
        }
        child.call(run_scheduler_process_func, arguments, reports_as="pipe_writer")
        infos: list[dict[str, Any]] = []
        result = SchedulerInitResult(
            scheduler_infos=infos,
            all_child_pids=[child.process.pid],
            wait_for_ready=lambda: infos.extend(
                _wait_for_scheduler_ready([child.connection], [child.process])
            ),
            block_until_scheduler_exits=child.process.join,
        )
        return result, [child.process]

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, server_args: ServerArgs, port_args: PortArgs, run_detokenizer_process_func: Callable[..., None]
    ) -> tuple[list[Any], list[str]]:
        if server_args.detokenizer_worker_num > 1:  # spawned as ever; they import while the model loads
            return super()._launch_detokenizer_subprocesses(  # type: ignore[no-any-return]
                server_args, port_args, run_detokenizer_process_func
            )
        child = cls.children.detokenizer
        child.call(run_detokenizer_process_func, {"server_args": server_args, "port_args": port_args})
        return [child.process], ["detokenizer"]


def server_args(spec: RuntimeSpec) -> ServerArgs:
    """SGLang's arguments for this runtime; the user's ``engine_args`` by SGLang's own names.

    Raises:
        ConfigError: SGLang knows no such argument, or one of ours was overridden.
        UnsupportedModelError: an option that elastic memory does not support.
    """
    ours = dict(_ALWAYS) | (_HOST if spec.device_kind == "host" else {})
    ours |= {
        "model_path": spec.path,
        "served_model_name": spec.model,
        "page_size": spec.block_tokens,
    }
    known = set(ServerArgs.__dataclass_fields__)
    for name in spec.engine_args:
        key = f"models.{spec.model}.engine_args.{name}"
        if name not in known:
            raise ConfigError(
                key, "is no argument of SGLang 0.5.17", "see `python -m sglang.launch_server --help`"
            )
        if name in ours and spec.engine_args[name] != ours[name]:
            raise ConfigError(key, "is set by prism_sgl itself", "remove it")
    defaults = _DEFAULTS | (_CUDA_DEFAULTS if spec.device_kind == "cuda" else {})
    args = ServerArgs(**(defaults | {"log_level": spec.log_level} | spec.engine_args | ours))
    refuse_unsupported_options(args, spec.model)
    return args


@dataclass
class RunningEngine:
    """An engine that has loaded its model, and what the worker needs of it."""

    app: Any  # SGLang's FastAPI app
    tokenizer_manager: Any
    rpc_ipc_name: str
    facts: RuntimeFacts
    phases: dict[str, float]
    watchdog: Any  # SGLang's, over scheduler and detokenizer

    def who_ended(self) -> str:
        """SGLang's process that is gone, and how; "" while all live (SGLang's watchdog.py:166)."""
        for process, name in zip(self.watchdog._processes, self.watchdog._names, strict=True):
            if not process.is_alive():
                return f"SGLang's {name} is gone, {describe_exit(process.exitcode)}"
        return ""


def start_engine(spec: RuntimeSpec, early: EarlyChildren | None = None) -> RunningEngine:
    """Start scheduler and detokenizer, in ``early`` processes if there are any; wait until the model is loaded.

    Must run in the main thread: SGLang's children die with the thread that started them (PDEATHSIG).
    """
    load_plugins()
    prove_hooks()
    args = server_args(spec)
    ports = PortArgs.init_new(args)
    # SGLang removes this file when it ends in order, which a killed engine does not.
    listing = Path(addresses.shared_files(spec.run_dir, spec.runtime))
    listing.write_text(f"{shm_path_for(ports.instance_id)}\n")
    engine = _engine_class(spec, early)
    tokenizer, template, _, scheduler, watchdog, _ = engine._launch_subprocesses(
        server_args=args,
        init_tokenizer_manager_func=engine.init_tokenizer_manager_func,
        run_scheduler_process_func=engine.run_scheduler_process_func,
        run_detokenizer_process_func=engine.run_detokenizer_process_func,
        port_args=ports,
    )
    info = scheduler.scheduler_infos[0]
    tokenizer._subprocess_watchdog = watchdog
    http_server.set_global_state(
        http_server._GlobalState(tokenizer_manager=tokenizer, template_manager=template, scheduler_info=info)
    )
    app = http_server.app
    app.is_single_tokenizer_mode = True
    app.server_args = args
    app.warmup_thread_kwargs = {
        "server_args": args,
        "launch_callback": None,
        "execute_warmup_func": _no_warmup,
    }
    return RunningEngine(
        app=app,
        tokenizer_manager=tokenizer,
        rpc_ipc_name=ports.rpc_ipc_name,
        facts=msgspec.convert(info["prism"], RuntimeFacts),
        phases=_phases(info.get("startup_time") or {}),
        watchdog=watchdog,
    )


def _phases(startup: Mapping[str, Any]) -> dict[str, float]:
    """What SGLang measured of its start, in seconds (startup_time.py:11); of CUDA graphs all kinds together."""
    return {
        "load_weight": startup.get("load_weight", 0.0),
        "kv_cache_allocation": startup.get("kv_cache_allocation", 0.0),
        "cuda_graph": sum(startup.get("cuda_graph", {}).values()),
    }


def _engine_class(spec: RuntimeSpec, early: EarlyChildren | None) -> type[RuntimeEngine]:
    if early is not None:
        EarlyEngine.children = early
        return EarlyEngine
    return ForkingEngine if spec.device_kind == "host" else RuntimeEngine


@contextlib.asynccontextmanager
async def app_lifespan(engine: RunningEngine) -> AsyncIterator[None]:
    """SGLang's FastAPI lifespan, with the server up from the start (http_server.py:270)."""
    async with http_server.lifespan(engine.app):
        engine.tokenizer_manager.server_status = ServerStatus.Up
        yield


def _no_warmup(*_args: Any, **_kwargs: Any) -> bool:
    return True
