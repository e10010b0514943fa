"""Costs of a model on one H100, from what the GPU benchmarks measured (benchmarks/results/gpu/*.json).

Rows are found by their names; a number that nobody measured is an assumption of ``ASSUMED``, listed by name in
every result, so that a reader sees what stands on measurement and what does not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_sgl.errors import ConfigError
from prism_sgl.schedulers.replay.spec import ModelCosts
from prism_sgl.units import round_up

RESULTS = ("overhead", "wake", "grow", "residual")
_MIB = 1 << 20
_PAGE_BYTES = 128 * _MIB
# The two models that benchmarks/gpu measures: bytes of their weights (wake.json: 14.96 GiB, 2.30 GiB).
_LARGE_BYTES = 14.96 * (1 << 30)
_SMALL_BYTES = 2.30 * (1 << 30)
_LOW_LOAD = "low load, one request at a time, 512 in + 64 out"
_FULL_LOAD = "full load, 128 x (256 in + 256 out)"

# Not in benchmarks/results/gpu; where each comes from.
ASSUMED: dict[str, str] = {
    "prefill_tokens_per_s": "40,000 for the 8B: 48 x 4096 on the same card (shared/gpu/README.md); no JSON row",
    "prefill of other sizes": "in proportion to weights from the 8B, at most 150,000 tokens/s; not measured",
    "decode of other sizes": "weights and KV read at the 8B's effective bandwidth, a step 2 ms at least; not measured",
    "time sharing": "n engines that compute at once get 1/n of the device each (no MPS); not measured",
    "copies": "engines run at 0.96 while a wake copies: decode -4 % beside wakes (shared/gpu/README.md); no JSON row",
    "overhead": "every size as the 8B: 2,559 MiB awake (graphs to batch 128; a probe, no JSON row), asleep as measured",
    "start_s": "10 s from waiting workers (commit fea6f7d); no JSON row",
    "tp": "t devices run a model at 0.8 t of one device's speed; not measured",
}
_PREFILL_TOKENS_PER_S = 40_000.0
_MOST_PREFILL_TOKENS_PER_S = 150_000.0
_LEAST_STEP_S = 0.002
_AWAKE_BYTES = 2559 * _MIB
_START_S = 10.0
_TP_EFFICIENCY = 0.8
COPY_SLOWDOWN = 0.96


@dataclass(frozen=True)
class Measured:
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


def read(folder: Path) -> Measured:
    """From the results of these names in this folder."""
    overhead, wake, grow, residual = (_rows(folder / f"{name}.json") for name in RESULTS)
    tpot_s = _row(overhead, f"{_LOW_LOAD}: TPOT p50") / 1000
    full_tpot_s = _row(overhead, f"{_FULL_LOAD}: TPOT p50") / 1000
    bytes_per_s = _LARGE_BYTES / tpot_s
    kv_s = 128 * (256 + 128) * 131072 / bytes_per_s  # on average half of the answer is written
    ttft_s = _row(overhead, f"{_LOW_LOAD}: TTFT p50") / 1000
    wakes = [_awake_later(wake, size) for size in ("8B", "1B")]
    wake_slope = (wakes[0] - wakes[1]) / (_LARGE_BYTES - _SMALL_BYTES)
    in_place = [_row(wake, f"{size}: wake, until it returns (its copies go on)") for size in ("8B", "1B")]
    in_place_slope = (in_place[0] - in_place[1]) / (_LARGE_BYTES - _SMALL_BYTES)
    sleeps = [_row(wake, f"{size}: sleep") for size in ("8B", "1B")]
    sleep_slope = (sleeps[0] - sleeps[1]) / (_LARGE_BYTES - _SMALL_BYTES)
    grow_s = _row(grow, "grow 1 GiB, pages of 128 MiB, against stock's cudaMalloc or cudaFree") / 1000
    give_s = _row(grow, "give back 1 GiB, pages of 128 MiB, against stock's cudaMalloc or cudaFree") / 1000
    return Measured(
        bytes_per_s=bytes_per_s,
        step_s_per_request=max(0.0, (full_tpot_s - tpot_s - kv_s) / 127),
        latency_s=max(0.0, ttft_s - tpot_s - 512 / _PREFILL_TOKENS_PER_S),
        wake_s_per_byte=wake_slope,
        wake_s_at_zero=wakes[0] - wake_slope * _LARGE_BYTES,
        wake_in_place_s_per_byte=in_place_slope,
        wake_in_place_s_at_zero=in_place[0] - in_place_slope * _LARGE_BYTES,
        sleep_s_per_byte=sleep_slope,
        sleep_s_at_zero=sleeps[0] - sleep_slope * _LARGE_BYTES,
        asleep_bytes=round(_row(residual, "8B with decode graphs to batch 32: asleep after work") * _MIB),
        map_s_per_page=(grow_s + give_s) * _PAGE_BYTES / (1 << 30),
    )


def costs(
    measured: Measured, *, weights_bytes: int, kv_bytes_per_token: int, context_tokens: int, tp: int = 1
) -> ModelCosts:
    """Of one model, or of one of its ``tp`` parts."""
    size = weights_bytes / _LARGE_BYTES
    speed = 1.0 if tp == 1 else tp * _TP_EFFICIENCY
    step_s = max(_LEAST_STEP_S, weights_bytes / measured.bytes_per_s / speed)
    prefill = min(_MOST_PREFILL_TOKENS_PER_S, _PREFILL_TOKENS_PER_S / size * speed)
    part_bytes = round_up(math.ceil(weights_bytes / tp), _PAGE_BYTES)
    part_kv = max(1, kv_bytes_per_token // tp)
    page_tokens = _PAGE_BYTES // part_kv
    return ModelCosts(
        weights_bytes=part_bytes,
        overhead_bytes=_AWAKE_BYTES,
        asleep_bytes=measured.asleep_bytes,
        kv_bytes_per_token=part_kv,
        page_bytes=_PAGE_BYTES,
        floor_bytes=-(-context_tokens // page_tokens) * _PAGE_BYTES,
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


def _awake_later(rows: dict[str, dict[str, Any]], size: str) -> float:
    """What a wake adds to the first token: from the begin of the wake, less the same request when awake."""
    name = f"{size}: first token, from the begin of the wake"
    note = str(rows[name].get("note", "")) if name in rows else ""
    before, found, after = note.partition(" ms;")
    try:
        awake_ms = float(before.rsplit(" ", 1)[-1]) if found and after else 0.0
    except ValueError:
        awake_ms = 0.0
    return _row(rows, name) - awake_ms / 1000


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
        return {str(row["what"]): row for row in content["rows"]}
    except OSError as error:
        raise _wrong(path, "the file", f"cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _wrong(path, "the file", f"is no result of benchmarks/gpu ({error})") from None


def _row(rows: dict[str, dict[str, Any]], what: str) -> float:
    value = rows.get(what, {}).get("ours")
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise _wrong(Path("measurements"), what, "is not measured")


def _wrong(path: Path, key: str, problem: str) -> ConfigError:
    files = ", ".join(f"{name}.json" for name in RESULTS)
    remedy = f"run benchmarks/gpu, or give --costs a folder that has {files}"
    return ConfigError(key, problem, remedy, file=str(path))
