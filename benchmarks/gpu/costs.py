"""The file of costs that replays count with, from the results of the GPU benchmarks on one card.

    python -m benchmarks.gpu.costs --out FILE [--results benchmarks/results/gpu]

Reads overhead.json (overhead_low.json too, if low load was measured in a run of its own), wake.json, grow.json and
residual.json. Those that come with the package are prism_sgl/launch/replay/h100.json and h200.json; every figure of the
simulator rests on the H100's, so who replaces it runs ``benchmarks.sim.figures``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.card import PAGE_BYTES
from benchmarks.gpu.models import KV_BYTES_PER_TOKEN
from benchmarks.gpu.nvml import GIB, MIB
from benchmarks.gpu.overhead import FULL, LOW
from benchmarks.gpu.results import RESULTS
from prism_sgl.launch.replay.measurements import (
    LARGE_BYTES,
    PREFILL_TOKENS_PER_S,
    Measured,
    MeasuredFile,
)

SMALL_BYTES = 2.30 * GIB  # weights of the 1B
FILES = {"overhead": True, "overhead_low": False, "wake": True, "grow": True, "residual": True}


class Rows:
    """Our values of all results in a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.card = ""
        self.sources: dict[str, str] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        for name, is_needed in FILES.items():
            path = folder / f"{name}.json"
            if not path.exists() and not is_needed:
                continue
            try:
                result = json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                sys.exit(f"{path} cannot be read ({error}); run python -m benchmarks.gpu.{name}")
            if self.card not in ("", result["card"]):
                sys.exit(
                    f"{path} is of one {result['card']}, the others of one {self.card}: costs of both are nobody's"
                )
            self.card = result["card"]
            self.sources[name] = f"{result['date']}, {result['command']}"
            self._rows |= {row["what"]: row for row in result["rows"]}

    def value(self, what: str) -> float:
        value = self._rows.get(what, {}).get("ours")
        if not isinstance(value, int | float) or not math.isfinite(value):
            sys.exit(f"nobody has measured {what!r}; run its benchmark of benchmarks/gpu again")
        return float(value)

    def awake_later(self, size: str) -> float:
        """What a wake adds to the first token: from the begin of the wake, less the same request when awake."""
        later_s = self.value(f"{size}: first token, from the begin of the wake")
        return later_s - self.value(f"{size}: first token of the same request, awake")


def line(large: float, small: float) -> tuple[float, float]:
    """(slope, value at zero) over bytes of weights."""
    slope = (large - small) / (LARGE_BYTES - SMALL_BYTES)
    return slope, large - slope * LARGE_BYTES


def derive(rows: Rows) -> Measured:
    step_s = rows.value(f"{LOW.name}: TPOT p50") / 1000
    first_s = rows.value(f"{LOW.name}: TTFT p50") / 1000
    full_step_s = rows.value(f"{FULL.name}: TPOT p50") / 1000
    bytes_per_s = LARGE_BYTES / step_s
    # On average half of the answer is written.
    tokens = FULL.requests * (FULL.tokens_in + FULL.tokens_out / 2)
    kv_s = tokens * KV_BYTES_PER_TOKEN["llama8b"] / bytes_per_s
    wake, wake_at_zero = line(rows.awake_later("8B"), rows.awake_later("1B"))
    in_place, in_place_at_zero = line(
        *(rows.value(f"{size}: wake, until it returns (its copies go on)") for size in ("8B", "1B"))
    )
    sleep, sleep_at_zero = line(rows.value("8B: sleep"), rows.value("1B: sleep"))
    map_ms = sum(
        rows.value(f"{what} 1 GiB, pages of 128 MiB, against stock's cudaMalloc or cudaFree")
        for what in ("grow", "give back")
    )
    return Measured(
        bytes_per_s=bytes_per_s,
        step_s_per_request=max(0.0, (full_step_s - step_s - kv_s) / (FULL.requests - 1)),
        latency_s=max(0.0, first_s - step_s - LOW.tokens_in / PREFILL_TOKENS_PER_S),
        wake_s_per_byte=wake,
        wake_s_at_zero=wake_at_zero,
        wake_in_place_s_per_byte=in_place,
        wake_in_place_s_at_zero=in_place_at_zero,
        sleep_s_per_byte=sleep,
        sleep_s_at_zero=sleep_at_zero,
        map_s_per_page=map_ms / 1000 * PAGE_BYTES / GIB,
        asleep_bytes=round(rows.value("8B with decode graphs to batch 32: asleep after work") * MIB),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = Rows(args.results)
    file = MeasuredFile(card=rows.card, sources=rows.sources, costs=derive(rows))
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n")
    print(f"{args.out}: {rows.card}")


if __name__ == "__main__":
    main()
