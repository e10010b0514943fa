"""A RuntimeSpec of a host device, of which a test names only what it is about."""

from __future__ import annotations

from typing import Any

import msgspec

from prism_sgl.messages import RuntimeId, RuntimeSpec
from prism_sgl.units import GRANULE_BYTES

_PLAIN = RuntimeSpec(
    runtime=RuntimeId("chat@host0.1"),
    model="chat",
    path="/none",
    device="host0",
    device_kind="host",
    device_index=0,
    ledger_path="/none",
    run_dir="/none",
    floor_bytes=0,
    ceiling_bytes=0,
    priority=0,
    block_tokens=1,
    kv_page_bytes=GRANULE_BYTES,
    weights_page_bytes=GRANULE_BYTES,
    engine_args={},
    env={},
    log_path="",
)


def runtime_spec(**fields: Any) -> RuntimeSpec:
    return msgspec.structs.replace(_PLAIN, **fields)
