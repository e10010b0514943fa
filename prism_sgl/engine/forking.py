"""Workers by fork, for host devices: the standby pays SGLang's imports once, a worker costs milliseconds.

Not on a card: SGLang's imports initialise CUDA, which does not survive a fork (waiting_room.py is the way there).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Collection
from functools import partial

from prism_sgl.engine.processes import die_with_parent, log_to, run_to_exit
from prism_sgl.engine.waiting_room import never_began
from prism_sgl.messages import RuntimeId, RuntimeSpec, Spawned, StandbyReady, StandbyToSupervisor

log = logging.getLogger(__name__)


class ForkingSource:
    """Owns the specs of this turn; a fork is never waited for."""

    def __init__(self, channel: socket.socket) -> None:
        """Blocks for the imports (25 to 35 s of a core)."""
        self._channel = channel  # to the supervisor: a worker must not hold it open
        self._specs: list[RuntimeSpec] = []
        began = time.monotonic()
        _import_all()
        self._untold: list[StandbyToSupervisor] = [StandbyReady(seconds=time.monotonic() - began)]

    def start(self, spec: RuntimeSpec) -> None:
        self._specs.append(spec)

    def cancel(self, runtime: RuntimeId) -> None:
        """None waits: each is forked in the step that follows its start."""

    def lost(self, pid: int, exit_code: int) -> bool:
        return False  # an orphan of some worker

    def descriptors(self) -> list[int]:
        return []

    def next_at(self) -> float | None:
        return None

    def step(self, readable: Collection[int]) -> list[StandbyToSupervisor]:
        told, self._untold = self._untold, []
        for spec in self._specs:
            parent = os.getpid()
            try:
                pid = os.fork()
            except OSError as error:  # processes or memory are short: the living workers go on
                log.error("%s could not be forked: %s", spec.runtime, error)
                told.append(never_began(spec, f"ForkError: {error}", 1))
                continue
            if pid == 0:
                run_to_exit(partial(self._become_worker, spec, parent))
            told.append(Spawned(runtime=spec.runtime, pid=pid))
        self._specs.clear()
        return told

    def leaders(self) -> list[int]:
        return []

    def _become_worker(self, spec: RuntimeSpec, parent: int) -> None:
        die_with_parent(parent)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._channel.close()
        log_to(spec.log_path)
        tempfile.tempdir = None  # the parent may have cached another
        from prism_sgl.engine.worker import serve

        serve(spec)


def _import_all() -> None:
    """The imports of worker, scheduler and detokenizer."""
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.models.registry  # noqa: F401  (all model classes: 6 s)
    from sglang.srt.plugins import load_plugins

    from prism_sgl.engine.seams import prove_hooks

    load_plugins()
    prove_hooks()
    import prism_sgl.engine.worker  # noqa: F401
