"""The tables of docs/benchmarks.md, from benchmarks/results/gpu, so that no number is copied by hand.

The last run of each benchmark lies there, runs on another card in a folder below it named by that card.

python -m benchmarks.gpu.tables            # writes them between the two marks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import RESULTS, ROOT

PAGE = ROOT / "docs/benchmarks.md"
BEGIN = "<!-- tables of benchmarks/gpu/tables.py begin -->"
END = "<!-- and end -->"
_VERDICTS = {True: "met", False: "**missed**", None: ""}


def table(result: dict[str, Any]) -> str:
    """One benchmark: its command, card and date, and a line a row."""
    lines = [
        f"### {result['name']}, {result['card'].removeprefix('NVIDIA ').partition(' ')[0]}",
        "",
        f"`{result['command']}`, {result['card']}, driver {result['driver']}, {result['date']}",
        "",
        "| what | ours | peer | unit | ratio | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratio = _number(row["ratio"])
        if "interval" in row:
            ratio += f" ({row['interval'][0]:.4g} to {row['interval'][1]:.4g})"
        cells = [row["what"], _number(row["ours"]), _number(row["peer"]), row["unit"], ratio, row["target"]]
        cells.append(_VERDICTS[row["met"]])
        if row["ours"] is None and row["peer"] is None:
            cells[-1] = row.get("note", "")
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def tables(folder: Path = RESULTS) -> str:
    files = [*sorted(folder.glob("*.json")), *sorted(folder.glob("*/*.json"))]
    return "\n\n".join(table(json.loads(file.read_text())) for file in files)


def write(page: Path = PAGE) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 10000 else f"{value:.0f}"


if __name__ == "__main__":
    write()
