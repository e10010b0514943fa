"""Starting one unforked SGLang engine for a runtime: its arguments, its child processes, its FastAPI app."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.load_snapshot import shm_path_for
from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs

from prism_sgl import addresses
from prism_sgl.engine.seams import prove_hooks
from prism_sgl.engine.support import refuse_unsupported_options
from prism_sgl.errors import ConfigError
from prism_sgl.messages import RuntimeFacts, RuntimeSpec

# What every runtime needs, whatever the user asks for.
_ALWAYS: dict[str, object] = {
    "skip_server_warmup": True,  # the stock warm-up wants SGLang's own HTTP port
    "sleep_on_idle": True,  # or an idle engine spins on a core that its neighbours need
    "enable_metrics": False,  # SGLang's gauges need a directory a process; ours come from ledger and router
}
# What the host device needs (facts section 8).
_HOST: dict[str, object] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "grammar_backend": "llguidance",  # xgrammar refuses the CPU
    "mem_fraction_static": 0.5,  # unused: the pool is sized by its ceiling (seams.py)
}
_DEFAULTS: dict[str, object] = {"max_running_requests": 32, "log_level": "info"}


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process, once it is certain that our hooks hold in it."""
    load_plugins()
    prove_hooks()
    run_scheduler_process(*args, **kwargs)


class RuntimeEngine(Engine):
    """SGLang's Engine with our scheduler entry; on the host its children are forked, not spawned.

    A spawned child pays SGLang's imports again (25 s of one core), a forked one has them already. Forking is
    safe here because nothing has started a thread yet and there is no CUDA context; on a card it is not.
    """

    fork_children = False
    run_scheduler_process_func: Callable[..., None] = staticmethod(run_scheduler)

    @classmethod
    def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.fork_children:
            mp.set_start_method("fork", force=True)
        return super()._launch_scheduler_processes(*args, **kwargs)


class ForkingEngine(RuntimeEngine):
    fork_children = True


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
    args = ServerArgs(**(_DEFAULTS | {"log_level": spec.log_level} | spec.engine_args | ours))
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


def start_engine(spec: RuntimeSpec) -> RunningEngine:
    """Start scheduler and detokenizer processes and wait until the model is loaded.

    Must run in the main thread: SGLang's children die with the thread that started them (PDEATHSIG).
    """
    load_plugins()
    prove_hooks()
    args = server_args(spec)
    ports = PortArgs.init_new(args)
    # SGLang removes this file when it ends in order, which a killed engine does not.
    listing = Path(addresses.shared_files(spec.run_dir, spec.runtime))
    listing.write_text(f"{shm_path_for(ports.instance_id)}\n")
    engine = ForkingEngine if spec.device_kind == "host" else RuntimeEngine
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
    startup = info.get("startup_time") or {}
    return RunningEngine(
        app=app,
        tokenizer_manager=tokenizer,
        rpc_ipc_name=ports.rpc_ipc_name,
        facts=msgspec.convert(info["prism"], RuntimeFacts),
        phases={name: value for name, value in startup.items() if isinstance(value, int | float)},
    )


@contextlib.asynccontextmanager
async def app_lifespan(engine: RunningEngine) -> AsyncIterator[None]:
    """SGLang's FastAPI lifespan, with the server up from the start (http_server.py:270)."""
    async with http_server.lifespan(engine.app):
        engine.tokenizer_manager.server_status = ServerStatus.Up
        yield


def _no_warmup(*_args: Any, **_kwargs: Any) -> bool:
    return True
