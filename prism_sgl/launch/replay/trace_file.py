"""Reads a trace (CSV with four columns) and makes the arrivals of a fleet from it.

Rate scale N as the paper and its prototype have it (facts: trace.py of prism-research): every request N times at
the same instant. A model with ``trace_shift`` gets its requests that much later, round the end of the trace, so that
several models may live on one part of it without being copies of each other in time.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from prism_sgl.errors import ConfigError
from prism_sgl.schedulers.replay.spec import Arrival, Fleet

COLUMNS = ("arrival_s", "model", "prompt_tokens", "output_tokens")
_MOST_TOKENS = 10**7
_JITTER_S = 0.5
_LONGEST_PAUSE_S = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Row:
    at_s: float
    model: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Rows in the order of their times. It lasts until its last arrival, rounded up to a second."""

    file: str
    rows: tuple[Row, ...]

    @property
    def seconds(self) -> float:
        return float(math.ceil(self.rows[-1].at_s)) or 1.0


def load(path: Path) -> Trace:
    """Raises ConfigError that names the line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            head = tuple(cell.strip() for cell in next(reader, []))
            if head != COLUMNS:
                raise _wrong(path, 1, f"is {','.join(head)[:80]!r}", f"begin with {','.join(COLUMNS)}")
            rows = [_row(path, reader.line_num, cells) for cells in reader if cells]
    except OSError as error:
        raise ConfigError(
            "the file", f"cannot be read ({error.strerror})", "give a CSV", file=str(path)
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            "the file", f"is no CSV ({error})", "save it as UTF-8 text", file=str(path)
        ) from None
    if not rows:
        raise _wrong(path, 2, "is missing", "a trace has one request at least")
    rows.sort(key=lambda row: row.at_s)
    for before_s, at_s in pairwise([0.0, *(row.at_s for row in rows)]):
        # Seconds since 1970, mostly: a live replay would sleep for 56 years.
        if at_s - before_s > _LONGEST_PAUSE_S:
            raise ConfigError(
                "arrival_s",
                f"goes from {before_s:.15g} to {at_s:.15g}, more than a week without a request",
                "subtract the first arrival from all of them",
                file=str(path),
            )
    return Trace(str(path), tuple(rows))


def _row(path: Path, line: int, cells: Sequence[str]) -> Row:
    if len(cells) != len(COLUMNS):
        raise _wrong(path, line, f"has {len(cells)} columns", f"give four: {', '.join(COLUMNS)}")
    try:
        at_s = float(cells[0])
    except ValueError:
        at_s = math.nan
    if not 0 <= at_s < math.inf:
        raise _wrong(path, line, f"has arrival_s {cells[0]!r}", "give seconds from the begin, 0 or more")
    numbers = []
    for column, cell, least in zip(COLUMNS[1:], cells[1:], (0, 1, 1), strict=True):
        try:
            number = int(cell)
        except ValueError:
            number = -1
        if not least <= number <= _MOST_TOKENS:
            raise _wrong(path, line, f"has {column} {cell!r}", f"give a whole number of {least} or more")
        numbers.append(number)
    return Row(at_s, *numbers)


def _wrong(path: Path, line: int, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"line {line}", problem, remedy, file=str(path))


def stretched(trace: Trace, time_scale: float) -> Trace:
    """Its times multiplied: below 1 is heavier."""
    return replace(trace, rows=tuple(replace(row, at_s=row.at_s * time_scale) for row in trace.rows))


def arrivals(trace: Trace, fleet: Fleet, rate_scale: float, seed: int = 0) -> list[Arrival]:
    """Of all models of the fleet. Seed 0 is the trace itself; others move each arrival by up to half a second.

    A scale that is not whole repeats some requests once more, spread evenly over the trace.
    """
    noise = random.Random(seed)
    found: list[Arrival] = []
    for spec in fleet.models:
        rows = [row for row in trace.rows if row.model == spec.trace_model]
        if not rows:
            raise ConfigError(
                f"models.{spec.name}.trace_model",
                f"is {spec.trace_model}, which {trace.file} does not have",
                f"give one of {', '.join(map(str, sorted({row.model for row in trace.rows})))}",
                file=fleet.name,
            )
        longest = max(row.prompt_tokens + row.output_tokens for row in rows)
        if longest > spec.costs.context_tokens:
            raise ConfigError(
                f"models.{spec.name}.context",
                f"is {spec.costs.context_tokens}, less than a request of {longest} tokens in {trace.file}",
                f"give {longest} or more",
                file=fleet.name,
            )
        due = 0.0
        for row in rows:
            due += rate_scale
            copies, due = int(due), due - int(due)
            shake = noise.uniform(-_JITTER_S, _JITTER_S) if seed else 0.0
            at_s = row.at_s + shake
            if spec.trace_shift_s:
                at_s = (at_s + spec.trace_shift_s) % trace.seconds
            one = Arrival(max(0.0, at_s), spec.name, row.prompt_tokens, row.output_tokens)
            found.extend([one] * copies)
    if not found:
        raise ConfigError(
            "--rate-scale", f"is {rate_scale:g}, at which no request arrives", "give more", file=trace.file
        )
    return sorted(found, key=lambda arrival: arrival.at_s)
