"""Reads a fleet: which models share which devices, and whose part of the trace each one gets.

devices = 2                    # of one size
memory = "74GiB"               # of each, for weights, KV and what engines hold beside them
[models.chat]
weights = "14.96GiB"
kv_bytes_per_token = 131072
trace_model = 2                # the number in the trace whose requests it gets
trace_shift = "0s"             # they come so much later, round the end of the trace
tp = 1                         # devices that one engine spans
context = 4096                 # tokens of the longest request
ttft_ms, tpot_ms               # its SLO; none: P95 on a device of its own, times --slo-scale
served_as = "chat"             # its name on the server of replay --live; else the fleet's
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prism_sgl.config_table import Table, read_toml
from prism_sgl.errors import ConfigError
from prism_sgl.launch.replay.measurements import ASSUMED, COPY_SLOWDOWN, PAGE_BYTES, Measured, costs
from prism_sgl.schedulers.replay.spec import Fleet, ModelSpec, Slo
from prism_sgl.units import GRANULE_BYTES

_KEYS = ("devices", "memory", "models")
_MODEL_KEYS = (
    "weights",
    "kv_bytes_per_token",
    "trace_model",
    "trace_shift",
    "tp",
    "context",
    "ttft_ms",
    "tpot_ms",
    "served_as",
)


@dataclass(frozen=True)
class FleetFile:
    """A fleet, which of its models bring an SLO of their own, and the name of each on a live server."""

    fleet: Fleet
    own_slos: frozenset[str]
    served: Mapping[str, str]


def load(path: Path, measured: Measured) -> FleetFile:
    """Raises ConfigError with key and remedy."""
    file = str(path)
    if not os.access(path, os.R_OK):
        remedy = "give the path of a fleet, e.g. examples/fleet_demo.toml"
        raise ConfigError("the file", "cannot be read", remedy, file=file)
    root = Table(file, "", read_toml(path, file), _KEYS)
    listed = root.values.get("models")
    if not isinstance(listed, dict) or not listed:
        root.fail("models", "is empty", "add a table, e.g. [models.chat] with weights and trace_model")
    memory = root.size("memory", 0, example="74GiB", low=1 << 30)
    if not memory:
        root.fail("memory", "is missing", 'give the budget of each device, e.g. memory = "74GiB"')
    devices = root.integer("devices", 1, 1, 1024)
    models, own, served = [], set(), {}
    for name, values in listed.items():
        table = Table(file, f"models.{name}", values, _MODEL_KEYS)
        models.append(_model(table, name, measured))
        if table.has("ttft_ms") or table.has("tpot_ms"):
            own.add(name)
        served[name] = table.text("served_as", name, example='"chat"')
        if models[-1].tp > devices:
            table.fail("tp", f"is {models[-1].tp}, more than the {devices} devices", "give a smaller one")
        if models[-1].costs.awake_bytes > memory:
            table.fail("weights", "do not fit a device with KV for one request", "raise tp or memory")
    notes = tuple(f"{what}: {why}" for what, why in ASSUMED.items())
    fleet = Fleet(path.stem, tuple(models), devices, memory, COPY_SLOWDOWN, notes)
    return FleetFile(fleet, frozenset(own), served)


def _model(table: Table, name: str, measured: Measured) -> ModelSpec:
    for key in ("weights", "kv_bytes_per_token", "trace_model"):
        if not table.has(key):
            table.fail(key, "is missing", f"give e.g. {key} = {_EXAMPLES[key]}")
    tp = table.integer("tp", 1, 1, 64)
    return ModelSpec(
        name=name,
        costs=costs(
            measured,
            weights_bytes=table.size("weights", 0, example="14.96GiB", low=GRANULE_BYTES),
            kv_bytes_per_token=table.integer("kv_bytes_per_token", 131072, 1, PAGE_BYTES * tp),
            context_tokens=table.integer("context", 4096, 2),
            tp=tp,
        ),
        trace_model=table.integer("trace_model", 0, 0),
        trace_shift_s=table.duration("trace_shift", 0.0, example="10s"),
        tp=tp,
        slo=Slo(table.milliseconds("ttft_ms", 2.0), table.milliseconds("tpot_ms", 0.1)),
    )


_EXAMPLES = {"weights": '"14.96GiB"', "kv_bytes_per_token": "131072", "trace_model": "2"}
