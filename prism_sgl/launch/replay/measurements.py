"""Costs of a model on a card, from what was measured there: an H100's and an H200's come with the package.

``python -m benchmarks.gpu.costs`` writes such a file from the results of the GPU benchmarks. A number that nobody
measured is an assumption of ``ASSUMED``, listed by name in every result, so that a reader sees what stands on
measurement and what does not.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from prism_sgl.errors import ConfigError
from prism_sgl.schedulers.replay.spec import ModelCosts
from prism_sgl.units import round_up

CARDS = {name: Path(__file__).with_name(f"{name}.json") for name in ("h100", "h200")}
H100 = CARDS["h100"]
_MIB = 1 << 20
PAGE_BYTES = 128 * _MIB
LARGE_BYTES = 14.96 * (1 << 30)  # weights of the 8B that was measured

# Not measured by benchmarks/gpu; where each comes from.
ASSUMED: dict[str, str] = {
    "prefill_tokens_per_s": "40,000 for the 8B: 48 prompts of 4096 on an H100, a probe; no JSON row",
    "prefill of other sizes": "in proportion to weights from the 8B, at most 150,000 tokens/s; not measured",
    "decode of other sizes": "weights and KV read at the 8B's effective bandwidth, a step 2 ms at least; not measured",
    "time sharing": "n engines that compute at once get 1/n of the device each (no MPS); not measured",
    "copies": "engines run at 0.96 while a wake copies: decode -4 % beside wakes on an H100, a probe; no JSON row",
    "overhead": "every size as the 8B: 2,559 MiB awake (graphs to batch 128; a probe, no JSON row), asleep as measured",
    "start_s": "10 s from waiting workers (commit fea6f7d); no JSON row",
    "tp": "t devices run a model at 0.8 t of one device's speed; not measured",
}
PREFILL_TOKENS_PER_S = 40_000.0  # of the 8B
_MOST_PREFILL_TOKENS_PER_S = 150_000.0
_LEAST_STEP_S = 0.002
_AWAKE_BYTES = 2559 * _MIB
_START_S = 10.0
_TP_EFFICIENCY = 0.8
COPY_SLOWDOWN = 0.96


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Straight lines through what was measured; sizes in bytes of weights."""

    bytes_per_s: float  # at which a decode step of batch 1 reads the weights of the 8B
    step_s_per_request: float
    latency_s: float  # of a request, outside the device
    wake_s_per_byte: float
    wake_s_at_zero: float
    wake_in_place_s_per_byte: float
    wake_in_place_s_at_zero: float
    sleep_s_per_byte: float
    sleep_s_at_zero: float
    map_s_per_page: float
    asleep_bytes: int  # beside pages


class MeasuredFile(msgspec.Struct, frozen=True):
    """A card's costs, and the runs that they come from: name of a result to its date and command."""

    card: str
    sources: dict[str, str]
    costs: Measured


def read(path: Path = H100) -> Measured:
    """Raises ConfigError: there is no such file, or it is none of ``python -m benchmarks.gpu.costs``."""
    remedy = f"make it by `python -m benchmarks.gpu.costs`, or name a card ({', '.join(CARDS)})"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=MeasuredFile).costs
    except OSError as error:
        raise ConfigError("the file", f"cannot be read ({error.strerror})", remedy, file=str(path)) from None
    except msgspec.MsgspecError as error:
        raise ConfigError("the file", f"is no file of costs ({error})", remedy, file=str(path)) from None
    if found.bytes_per_s <= 0:
        raise ConfigError("costs.bytes_per_s", "is not positive", remedy, file=str(path))
    return found


def costs(
    measured: Measured, *, weights_bytes: int, kv_bytes_per_token: int, context_tokens: int, tp: int = 1
) -> ModelCosts:
    """Of one model, or of one of its ``tp`` parts."""
    size = weights_bytes / LARGE_BYTES
    speed = 1.0 if tp == 1 else tp * _TP_EFFICIENCY
    step_s = max(_LEAST_STEP_S, weights_bytes / measured.bytes_per_s / speed)
    prefill = min(_MOST_PREFILL_TOKENS_PER_S, PREFILL_TOKENS_PER_S / size * speed)
    part_bytes = round_up(math.ceil(weights_bytes / tp), PAGE_BYTES)
    part_kv = max(1, kv_bytes_per_token // tp)
    page_tokens = PAGE_BYTES // part_kv
    return ModelCosts(
        weights_bytes=part_bytes,
        overhead_bytes=_AWAKE_BYTES,
        asleep_bytes=measured.asleep_bytes,
        kv_bytes_per_token=part_kv,
        page_bytes=PAGE_BYTES,
        floor_bytes=-(-context_tokens // page_tokens) * PAGE_BYTES,
        context_tokens=context_tokens,
        latency_s=measured.latency_s,
        pass_s=step_s,  # a pass of few tokens reads the same weights as a decode step does
        prefill_s_per_token=1 / prefill,
        step_s=step_s,
        step_s_per_request=measured.step_s_per_request,
        step_s_per_token=kv_bytes_per_token / measured.bytes_per_s / speed,
        wake_s=max(0.005, measured.wake_s_at_zero + measured.wake_s_per_byte * part_bytes),
        wake_in_place_s=max(
            0.005, measured.wake_in_place_s_at_zero + measured.wake_in_place_s_per_byte * part_bytes
        ),
        sleep_s=max(0.001, measured.sleep_s_at_zero + measured.sleep_s_per_byte * part_bytes),
        start_s=_START_S,
        map_s_per_page=measured.map_s_per_page,
    )
