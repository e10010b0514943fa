"""How long the ledger takes with 32 live owners, each in a process of its own.

    python -m benchmarks.ledger

Prints medians of one run and writes benchmarks/results/ledger.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.messages import RuntimeState
from prism_sgl.units import GRANULE_BYTES

NUM_OWNERS = 32
NUM_ROUNDS = 5000
RESULT = Path(__file__).parent / "results" / "ledger.json"

_OWNER = """
import sys
from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.messages import RuntimeState
owner = Ledger.open(sys.argv[1]).join(sys.argv[2], floor=4, ceiling=64, priority=0, bell="")
owner.set_state(RuntimeState.AWAKE)
assert owner.try_reserve(Kind.KV, 8)
print("ready", flush=True)
sys.stdin.read()
"""


def median_us(action: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    """Median of ``action``; ``after`` puts things back, untimed."""
    times_ns = []
    for _ in range(NUM_ROUNDS):
        began_ns = time.perf_counter_ns()
        action()
        times_ns.append(time.perf_counter_ns() - began_ns)
        after()
    return statistics.median(times_ns) / 1000


def measure(path: str, ledger: Ledger) -> list[tuple[str, float, float | None]]:
    """(what, median us, target us)"""
    owner = ledger.join("bench", floor=0, ceiling=ledger.budget, priority=0, bell="")
    owner.set_state(RuntimeState.AWAKE)

    def reserve() -> None:
        assert owner.try_reserve(Kind.WEIGHTS, 4)

    def reserve_after_liveness_test() -> None:
        assert ledger.reap(None) == 0  # asks the kernel about every owner
        assert owner.try_reserve(Kind.WEIGHTS, 4)

    def release() -> None:
        owner.release(Kind.WEIGHTS, 4)

    def reserve_too_much() -> None:
        assert not owner.try_reserve(Kind.WEIGHTS, ledger.budget)

    return [
        ("try_reserve, granted", median_us(reserve, release), 50.0),
        ("try_reserve, refused", median_us(reserve_too_much), 50.0),
        (
            "liveness test of all owners, then try_reserve",
            median_us(reserve_after_liveness_test, release),
            50.0,
        ),
        ("release", median_us(release, reserve) if owner.try_reserve(Kind.WEIGHTS, 4) else 0.0, None),
        ("totals, liveness test included", median_us(ledger.totals), None),
        ("owners, liveness test included", median_us(ledger.owners), None),
        ("target (polled at every safe point)", median_us(owner.target), None),
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "").parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = f"{folder}/bench.ledger"
        ledger = Ledger.create(path, 4096 * GRANULE_BYTES, "bench")
        owners = [
            subprocess.Popen(
                [sys.executable, "-c", _OWNER, path, f"model{number}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(NUM_OWNERS - 1)
        ]
        try:
            for process in owners:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            rows = measure(path, ledger)
            alive = sum(view.alive for view in ledger.owners())
        finally:
            for process in owners:
                process.kill()
                process.wait()
    print(f"{alive} live owners, {NUM_ROUNDS} rounds, medians")
    for what, value, target in rows:
        print(f"  {what:<48} {value:8.2f} us" + (f"   (target: under {target:.0f})" if target else ""))
    write(rows)


def write(rows: list[tuple[str, float, float | None]]) -> None:
    result = {
        "name": "ledger",
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.ledger",
        "machine": {"cores": os.cpu_count(), "cpu": platform.machine(), "python": platform.python_version()},
        "rows": [
            {
                "what": f"{what}; {NUM_OWNERS} live owners, median",
                "value": round(value, 2),
                "unit": "us",
                "target": target,
                "met": None if target is None else value < target,
            }
            for what, value, target in rows
        ],
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
