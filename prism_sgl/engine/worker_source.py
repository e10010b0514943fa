"""What a standby asks of the way in which its workers come to be: forked, or waiting."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from prism_sgl.messages import RuntimeId, RuntimeSpec, StandbyToSupervisor


class WorkerSource(Protocol):
    """Turns specs into worker processes, each the leader of a session. Never blocks for long."""

    def start(self, spec: RuntimeSpec) -> None:
        """This runtime shall live; ``step`` tells when a process has the spec."""

    def cancel(self, runtime: RuntimeId) -> None:
        """Forget a spec that no process has yet; nothing to do for others."""

    def lost(self, pid: int, exit_code: int) -> bool:
        """A child that is no worker has ended; whether it was a leader of ours, with a session to end."""

    def descriptors(self) -> list[int]:
        """What to wake for."""

    def next_at(self) -> float | None:
        """When to call ``step`` at the latest (monotonic), None: only for a descriptor or a new spec."""

    def step(self, readable: Collection[int]) -> list[StandbyToSupervisor]:
        """Do what there is to do, and answer what the supervisor has to know. A Spawned is a worker from then on."""

    def leaders(self) -> list[int]:
        """Sessions that are to be killed with the standby, beside those of the workers."""
