"""The Controller's moves as spans of time, read from its commands to the supervisor.

Target first: a runtime is started for a model that has one, serves both for a while, and in the end one is stopped.
Whoever waits for a first token in between is caught in the move (``outcomes.caught_in_moves``).
"""

from __future__ import annotations

from prism_sgl.messages import RuntimeId, StartRuntime, StopRuntime
from prism_sgl.schedulers.replay.spec import Move


class MovesSeen:
    """Owner of the runtimes that were started and not stopped. A replica counts as a move that has not ended."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self._runtimes: dict[str, set[RuntimeId]] = {}
        self._open: dict[str, Move] = {}

    def saw(self, message: object, now: float) -> None:
        match message:
            case StartRuntime(runtime=runtime, model=model):
                others = self._runtimes.setdefault(model, set())
                if others and model not in self._open:
                    self._open[model] = Move(model, now)
                    self.moves.append(self._open[model])
                others.add(runtime)
            case StopRuntime(runtime=runtime):
                model = runtime.rpartition("@")[0]
                self._runtimes.setdefault(model, set()).discard(runtime)
                if model in self._open and len(self._runtimes[model]) <= 1:
                    self._open.pop(model).ended_at = now
            case _:
                pass

    def since(self, began_s: float) -> list[Move]:
        """In the time of a trace that began then; what was over before is left out."""
        return [
            Move(move.model, move.began_at - began_s, move.ended_at - began_s)
            for move in self.moves
            if move.ended_at >= began_s
        ]
