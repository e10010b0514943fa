"""What the terminal shows: one line an event, no control characters, so that a log file reads the same."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TextIO

from prism_sgl import addresses
from prism_sgl.messages import RuntimeId

READY_PHASE = "ready"


class Progress:
    """Prints lines with the seconds since the start, and the phases that starting workers write to files."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began = time.monotonic()
        self._watched: dict[RuntimeId, _PhaseFile] = {}

    def elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def line(self, text: str) -> None:
        self.text(f"[{self.elapsed_s():7.1f}s] {' '.join(text.split())}")

    def text(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        # Errors of SGLang may hold characters that this terminal does not have.
        shown = text.encode(encoding, "replace").decode(encoding)
        with contextlib.suppress(OSError):  # the terminal may have gone; the server has not
            print(shown, file=self._out, flush=True)

    def watch(self, run_dir: str, runtime: RuntimeId) -> None:
        self._watched[runtime] = _PhaseFile(Path(addresses.phases(run_dir, runtime)))

    def forget(self, runtime: RuntimeId) -> None:
        self._watched.pop(runtime, None)

    def poll(self) -> list[RuntimeId]:
        """Print new phases; answer the runtimes that became ready since the last time."""
        ready = []
        for runtime, file in list(self._watched.items()):
            for phase, seconds in file.read():
                if phase == READY_PHASE:
                    self.line(f"{runtime}: ready in {seconds:.1f} s")
                    ready.append(runtime)
                    self.forget(runtime)
                else:
                    self.line(f"{runtime}: {phase} {seconds:.1f} s")
        return ready


class _PhaseFile:
    """``<phase> <seconds>`` lines as they are appended; a line without its end waits for the next read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[tuple[str, float]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        phases = []
        for line in whole.decode(errors="replace").splitlines():
            phase, _, seconds = line.rpartition(" ")
            try:
                phases.append((phase, float(seconds)))
            except ValueError:
                continue
        return phases
