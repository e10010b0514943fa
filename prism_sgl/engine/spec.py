"""How a worker tells its own SGLang children what they are: two variables in its environment.

SGLang starts its scheduler as a process of its own and gives us no argument to pass, so the spec travels in
the environment. Absent variables mean "not our process": then the plugin does nothing.
"""

from __future__ import annotations

import os

from prism_sgl import messages
from prism_sgl.errors import SeamError
from prism_sgl.messages import RuntimeSpec

DEVICE_KIND_VARIABLE = "PRISM_SGL_DEVICE_KIND"  # set before SGLang is imported: the platform is chosen there
SPEC_VARIABLE = "PRISM_SGL_RUNTIME_SPEC"  # set before SGLang's children start


# SGLang sets these for its children before it starts them (engine.py:1571). Ours import before that, and CUDA and
# CUTLASS read them while they do.
_BEFORE_CUDA = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "8",
    "CUDA_MODULE_LOADING": "AUTO",
    "TRTLLM_ENABLE_PDL": "1",
    "CUTE_DSL_LOG_LEVEL": "30",
    "CUTE_DSL_LOG_TO_CONSOLE": "1",
    # Else SGLang binds its scheduler to the card's NUMA node by starting it through numactl, which is too late for
    # a process that runs already; so it binds itself.
    "SGLANG_NUMA_BIND_V2": "0",
}


def device_kind() -> str | None:
    """ "host" or "cuda" in a process that our worker or standby started, else None."""
    return os.environ.get(DEVICE_KIND_VARIABLE)


def announce_device_kind(kind: str) -> None:
    """Make this process ours: SGLang loads our two entry points and no other plugin."""
    os.environ[DEVICE_KIND_VARIABLE] = kind
    os.environ["SGLANG_PLUGINS"] = "prism_sgl"
    if kind == "cuda":
        for name, value in _BEFORE_CUDA.items():
            os.environ.setdefault(name, value)
    if kind == "host":
        os.environ["SGLANG_PLATFORM"] = "prism_sgl"
        # One thread an engine: several engines share the cores, and spinning pools would fight for them.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # The first JSON schema would wait 37 s while inductor compiles one masked_fill (llguidance/torch.py).
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def announce_spec(spec: RuntimeSpec) -> None:
    """For the children that SGLang will start."""
    os.environ[SPEC_VARIABLE] = messages.encode_json(spec).decode()


def current_spec() -> RuntimeSpec:
    """The spec of the runtime that this process belongs to."""
    text = os.environ.get(SPEC_VARIABLE)
    if text is None:
        raise SeamError(f"{SPEC_VARIABLE} is not set: this SGLang process was not started by our worker")
    return messages.decode_runtime_spec(text)
