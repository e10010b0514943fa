"""A CPU platform for SGLang that is not ours, and a witness inside its scheduler process."""

import json
import os


def platform():
    return "plain_cpu_platform.PlainPlatform"


def witness():
    """General plugin: runs in the scheduler process after all plugins registered; writes what it sees at exit
    of the import phase, when the first batch is asked for."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def look(result, scheduler):
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        # SGLang's own dependency smg_grpc_servicer registers one as well; ours would come from prism_sgl.
        hooks = [(t, h.__module__) for t, hooks in HookRegistry._hooks.items() for _, h, _ in hooks]
        with open(os.environ["WITNESS_FILE"], "w") as file:
            json.dump(
                {
                    "pool": f"{type(pool).__module__}.{type(pool).__qualname__}",
                    "allocator": f"{type(scheduler.token_to_kv_pool_allocator).__module__}",
                    "hooks": sorted(t for t, module in hooks if module.startswith("prism_sgl")),
                    "rpc": [n for n in dir(type(scheduler)) if n.startswith("prism")],
                    "engine_modules": sorted(
                        m for m in __import__("sys").modules if m.startswith("prism_sgl.allocator")
                    ),
                },
                file,
            )

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_init_info", look, HookType.AFTER)
