"""Which models shall be up before the server calls itself ready, and what became of each."""

from __future__ import annotations

from prism_sgl.config import Config
from prism_sgl.launch.banner import ready_lines
from prism_sgl.launch.progress import Progress


class Readiness:
    """Prints the ready lines once, when each preloaded model is ready or has failed once."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self._states = {model.name: "" for model in config.models.values() if model.preload}

    def begin(self) -> None:
        if not self._states:
            self._print()

    def settle(self, model: str, state: str) -> None:
        if self._states.get(model) == "":
            self._states[model] = state
            if all(self._states.values()):
                self._print()

    def _print(self) -> None:
        self._progress.line(f"ready in {self._progress.elapsed_s():.1f} s")
        for line in ready_lines(self._config, self._states):
            self._progress.text(line)
