"""Where a benchmark's numbers go: one JSON file, written anew after every row, so that a cut run keeps its rows."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.stats import Ratio

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/gpu"


def result_path(name: str) -> Path:
    """``$OUT`` is the folder whose files come back from the GPU box."""
    out = os.environ.get("OUT")
    return (Path(out) if out else RESULTS) / f"{name}.json"


class Results:
    """The rows of one benchmark."""

    def __init__(self, name: str, *, card: str, driver: str) -> None:
        self.path = result_path(name)
        self._head = {
            "name": name,
            "card": card,
            "driver": driver,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "-m", f"benchmarks.gpu.{name}", *sys.argv[1:]]),
        }
        self.rows: list[dict[str, Any]] = []

    def add(
        self,
        what: str,
        ours: float | None,
        peer: float | None,
        unit: str,
        *,
        ratio: Ratio | float | None = None,
        target: str = "",
        met: bool | None = None,
        note: str = "",
    ) -> None:
        """``ratio`` is ours over peer's; left out, it is computed. A row of the same ``what`` is replaced."""
        if ratio is None and ours is not None and peer:
            ratio = ours / peer
        row: dict[str, Any] = {
            "what": what,
            "ours": _rounded(ours),
            "peer": _rounded(peer),
            "unit": unit,
            "ratio": _rounded(ratio.value if isinstance(ratio, Ratio) else ratio),
            "target": target,
            "met": met,
        }
        if isinstance(ratio, Ratio):
            row["interval"] = [_rounded(ratio.low), _rounded(ratio.high)]
        if note:
            row["note"] = note
        places = [index for index, old in enumerate(self.rows) if old["what"] == what]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self.write()
        verdict = {True: "met", False: "MISSED", None: ""}[met]
        interval = f" {row['interval']}" if "interval" in row else ""
        print(
            f"ROW {what}: ours {row['ours']} peer {row['peer']} {unit} ratio {row['ratio']}{interval} "
            f"target {target or '-'} {verdict} {note}",
            flush=True,
        )

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self._head | {"rows": self.rows}, indent=1) + "\n")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One measurement: whatever goes wrong in it becomes a row that says so, and the others go on."""
        try:
            yield
        except Exception as error:  # a benchmark must bring home what it can
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self.add(what, None, None, "", note=f"not run: {reason}")


def _rounded(value: float | None) -> float | None:
    """Five significant digits: what follows is noise."""
    return None if value is None else float(f"{value:.5g}")
