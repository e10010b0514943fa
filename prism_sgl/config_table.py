"""One TOML table, read key by key: each wrong value becomes one ConfigError line with key and remedy.

Knows nothing of what the keys mean; ``config.py`` says which there are, their ranges and defaults.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from prism_sgl.errors import ConfigError
from prism_sgl.units import GRANULE_BYTES, parse_duration, parse_size, show_size


class Table:
    """A table of the file, whose keys are all known (else the constructor raises)."""

    def __init__(self, file: str, where: str, values: object, keys: Iterable[str]) -> None:
        self.file = file
        self.where = where
        if not isinstance(values, dict):
            self.fail("", f"is {show_value(values)}, not a table", f"write it as [{where}]")
        self.values: dict[str, Any] = values
        known = list(keys)
        for key in self.values:
            if key not in known:
                self.fail(key, "is not a known key", _advice(key, known))

    def fail(self, key: str, problem: str, remedy: str) -> NoReturn:
        path = ".".join(part if part.isprintable() else repr(part) for part in (self.where, key) if part)
        raise ConfigError(path, problem, remedy, file=self.file)

    def has(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: str | None, *, example: str, choices: Iterable[str] = ()) -> str:
        value = self._get(key, default, example)
        wanted = tuple(choices)
        if wanted and value not in wanted:
            advice = " or ".join(f'"{choice}"' for choice in wanted)
            self._wrong(key, value, f"give {advice}")
        if not isinstance(value, str) or (not value and value != default):
            self._wrong(key, value, f"give text, e.g. {example}")
        return value

    def texts(self, key: str, *, example: str, secret: bool = False) -> tuple[str, ...]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            shown = "not a list of texts" if secret else f"{show_value(value)}, not a list of texts"
            self.fail(key, f"is {shown}", f"give e.g. {example}")
        return tuple(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            self._wrong(key, value, "give true or false")
        return value

    def integer(self, key: str, default: int, low: int, high: int | None = None) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
            bounds = f"from {low} to {high}" if high else f"of {low} or more"
            self._wrong(key, value, f"give a whole number {bounds}, e.g. {max(default, low)}")
        return value

    def power_of_two(self, key: str, default: int, high: int) -> int:
        value = self.values.get(key, default)
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= high
        if not fits or value & (value - 1):
            self._wrong(key, value, f"give a power of two up to {high}, e.g. {default}")
        return int(value)

    def any_integer(self, key: str, default: int) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(key, value, f"give a whole number, e.g. {default}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self._wrong(key, value, f"give a number from {low:g} to {high:g}, e.g. {default:g}")
        return float(value)

    def size(self, key: str, default: int, *, example: str, low: int = 0) -> int:
        value = self.values.get(key, default)
        size_bytes = parse_size(value)
        if size_bytes is None:
            self._wrong(key, value, f'give a size, e.g. "{example}"')
        if size_bytes < low and key in self.values:
            self._wrong(key, value, f'give at least {show_size(low)}, e.g. "{example}"')
        return size_bytes

    def page_size(self, key: str, default: int) -> int:
        size_bytes = self.size(key, default, example=show_size(default), low=GRANULE_BYTES)
        if size_bytes % GRANULE_BYTES:
            self._wrong(key, self.values[key], f'give a multiple of 2MiB, e.g. "{show_size(default)}"')
        return size_bytes

    def duration(self, key: str, default: float, *, example: str, low: float = 0.0) -> float:
        value = self.values.get(key, default)
        seconds = parse_duration(value)
        if seconds is None:
            self._wrong(key, value, f'give a time, e.g. "{example}" or {default:g} (seconds)')
        if seconds < low:
            self._wrong(key, value, f'give at least {low:g} s, e.g. "{example}" or {default:g} (seconds)')
        return seconds

    def milliseconds(self, key: str, default_s: float) -> float:
        """Seconds of a key whose unit stands in its name."""
        value = self.values.get(key, default_s * 1000)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self._wrong(key, value, f"give a time in milliseconds, e.g. {default_s * 1000:.0f}")
        return value / 1000

    def mapping(self, key: str) -> dict[str, object]:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            self._wrong(key, value, f"write it as {key} = {{ name = value }}")
        return dict(value)

    def _get(self, key: str, default: str | None, example: str) -> Any:
        if key not in self.values and default is None:
            self.fail(key, "is missing", f"give e.g. {key} = {example}")
        return self.values.get(key, default)

    def _wrong(self, key: str, value: object, remedy: str) -> NoReturn:
        self.fail(key, f"is {show_value(value)}", remedy)


def read_toml(path: Path, file: str) -> dict[str, Any]:
    """The whole file as tables."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).rpartition(" (at ")
        where = place.rstrip(")") if message else "the end"
        raise ConfigError(where, f"is not TOML ({message or error})", "correct it there", file=file) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"byte {error.start}", "is not UTF-8", "save the file as UTF-8", file=file
        ) from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise ConfigError("the file", problem, "give the path of a models.toml", file=file) from None


def keys_of(struct: type[msgspec.Struct]) -> Iterator[str]:
    """Keys in the file: names of fields without their unit, because the value carries one ("64MiB", "5m")."""
    for field in msgspec.structs.fields(struct):
        yield field.name.removesuffix("_bytes").removesuffix("_s")


def show_value(value: object) -> str:
    """As it stands in the file, in one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    shown = '"' + value + '"' if isinstance(value, str) else str(value)
    shown = " ".join(shown.split())
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _advice(key: str, known: list[str]) -> str:
    for candidate in (key.replace("-", "_"), key.removesuffix("_bytes"), key.removesuffix("_s")):
        if candidate in known:
            return f"did you mean {candidate}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
