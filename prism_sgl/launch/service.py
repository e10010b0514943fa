"""A process that shall always run: the router, an api_server, a standby. Started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from signal import SIGKILL, Signals

from prism_sgl.backoff import Backoff
from prism_sgl.errors import describe_exit
from prism_sgl.launch.children import Child, why_ended
from prism_sgl.launch.progress import Progress
from prism_sgl.launch.run_dir import RunDir
from prism_sgl.launch.tasks import Fail, start_task


class Service:
    """Keeps one process alive until ``stop``.

    ``start`` starts it; ``gone`` is awaited after each end, before the next start, so that what hung on the
    dead process is settled first.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Child],
        gone: Callable[[str], Awaitable[None]] | None,
        *,
        run_dir: RunDir,
        progress: Progress,
        log: Path,
        fail: Fail,
    ) -> None:
        self.name = name
        self.child: Child | None = None
        self.num_restarts = 0
        self._start = start
        self._gone = gone
        self._run_dir = run_dir
        self._progress = progress
        self._log = log
        self._fail = fail
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._launch()
        self._task = start_task(self._keep(), self._fail)

    def send_signal(self, number: Signals) -> None:
        if self.child is not None:
            self.child.send_signal(number)

    async def stop(self, number: Signals, within_s: float) -> None:
        """Ask it to end; kill it when it has not by then."""
        self._stopping.set()
        if self._task is None:
            return
        self.send_signal(number)
        done, _ = await asyncio.wait({self._task}, timeout=within_s)
        if not done:
            self._progress.line(f"{self.name}: did not stop within {within_s:g} s, killed")
            self.send_signal(SIGKILL)
            await self._task

    def drop(self) -> None:
        """No more restarts; the process itself is ended by whoever calls."""
        self._stopping.set()
        if self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        """The process, which somebody has killed, is reaped."""
        if self.child is not None:
            await self.child.exited

    def _launch(self) -> None:
        self.child = self._start()
        self._run_dir.record(self.child.pid, self.name)

    async def _keep(self) -> None:
        backoff = Backoff()
        while True:
            assert self.child is not None
            child, began = self.child, time.monotonic()
            code = await asyncio.shield(child.exited)
            self._run_dir.forget(child.pid)
            if self._stopping.is_set():
                return
            reason = describe_exit(code)
            if error := why_ended(code, self._log):
                reason += f": {error}"
            if self._gone is not None:
                await self._gone(reason)
            if not await self._start_again(f"ended ({reason})", time.monotonic() - began, backoff):
                return

    async def _start_again(self, why: str, lived_s: float, backoff: Backoff) -> bool:
        """False: it was stopped while it waited."""
        while True:
            wait_s = backoff.after(lived_s)
            self._progress.line(f"{self.name}: {why}; starts again in {wait_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
            if self._stopping.is_set():
                return False
            self.num_restarts += 1
            try:
                self._launch()
            except OSError as error:  # no process, a full disk: it may pass, and engines live meanwhile
                why, lived_s = f"could not be started ({error})", 0.0
            else:
                return True
