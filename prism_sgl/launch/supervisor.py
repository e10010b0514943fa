"""The first process of an instance: starts all others, starts them again when they end, ends them all.

It takes no request and knows no policy. The router says which runtimes shall live; the supervisor has their
standbys start and kill workers, and tells the router when one is gone with all its processes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from prism_sgl.allocator.ledger import Ledger
from prism_sgl.config import Config, DeviceConfig, cuda_environment, log_dir, save
from prism_sgl.errors import EXIT_OK, describe_exit
from prism_sgl.launch.cards import check_cards
from prism_sgl.launch.children import Child, start_child, why_ended
from prism_sgl.launch.descriptors import raise_descriptor_limit
from prism_sgl.launch.image_store import ImageStore
from prism_sgl.launch.listen import listen
from prism_sgl.launch.logs import begin_log, keep_logs_short, make_log_dir
from prism_sgl.launch.nvml import ReadCards, read_cards
from prism_sgl.launch.processes import end_sessions
from prism_sgl.launch.progress import Progress
from prism_sgl.launch.readiness import Readiness
from prism_sgl.launch.router_link import RouterLink
from prism_sgl.launch.run_dir import RunDir
from prism_sgl.launch.runtimes import Runtime, build_spec, remove_files
from prism_sgl.launch.service import Service
from prism_sgl.launch.standby import StandbyLink, private_environment, share_host
from prism_sgl.launch.tasks import start_task
from prism_sgl.messages import (
    Introduce,
    RouterToSupervisor,
    RuntimeExited,
    RuntimeId,
    Spawned,
    StandbyReady,
    StandbyToSupervisor,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    WorkerExited,
)
from prism_sgl.units import show_size

_KILL_GRACE_S = 5.0
_SERVICE_GRACE_S = 3.0
_POLL_PHASES_S = 0.5


@dataclass(frozen=True)
class Programs:
    """Module names of the processes, so that a test can put small ones in their place."""

    router: str = "prism_sgl.launch.router"
    api_server: str = "prism_sgl.launch.api_server"
    standby: str = "prism_sgl.engine.standby"


def run(
    config: Config,
    *,
    programs: Programs | None = None,
    out: TextIO = sys.stdout,
    read_cards: ReadCards = read_cards,
) -> int:
    """Serve until SIGINT or SIGTERM. Raises ConfigError or PortInUseError before anything is started."""
    raise_descriptor_limit()
    with listen(config.server.host, config.server.port, file=config.file) as listener:
        progress = Progress(out)
        directory = RunDir(config.server.run_dir, config.server.port, progress.line)
        directory.acquire()
        try:
            make_log_dir(config)
            # Only now: what a killed instance left on the cards has been ended.
            for note in check_cards(config, cuda_environment(), read_cards, is_here=True):
                progress.line(f"warning: {note}")
            supervisor = Supervisor(config, listener, directory, programs or Programs(), progress)
            return asyncio.run(supervisor.serve())
        finally:
            directory.end_all()
            directory.remove()


class Supervisor:
    """Owns the processes of one instance. All of its state is touched by its one loop only."""

    def __init__(
        self,
        config: Config,
        listener: socket.socket,
        directory: RunDir,
        programs: Programs,
        progress: Progress,
    ) -> None:
        self._config = config
        self._listener = listener
        self._directory = directory
        self._programs = programs
        self._progress = progress
        self._env = private_environment(directory.path)
        self._log_dir = Path(log_dir(config))
        self._runtimes: dict[RuntimeId, Runtime] = {}
        self._standbys: dict[str, StandbyLink] = {}
        self._shares = share_host(config, len(os.sched_getaffinity(0)))
        self._services: list[Service] = []
        self._readiness = Readiness(config, progress)
        self._signals = 0
        self._failure: BaseException | None = None
        self._stop = asyncio.Event()
        self._stop_at_once = asyncio.Event()
        self._none_left = asyncio.Event()

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(
            lambda _, context: self._fail(context.get("exception") or RuntimeError(context["message"]))
        )
        # Ignored under nohup: the server shall outlive its terminal.
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):
            loop.add_signal_handler(number, self._on_signal)
        self._link = RouterLink(str(self._directory.path), self._on_router, self._fail)
        self._images = ImageStore(
            str(self._directory.path),
            self._config.memory.host_cache_bytes,
            self._progress.line,
            in_use=lambda model: any(runtime.spec.model == model for runtime in self._runtimes.values()),
        )
        try:
            self._start()
            tasks = [start_task(work, self._fail) for work in (self._tick(), keep_logs_short(self._logs))]
            await self._stop.wait()
            await self._stop_in_order()
            for task in tasks:
                task.cancel()
        finally:
            for service in self._services:
                service.drop()
            await asyncio.to_thread(self._directory.end_all)
            if ended := [asyncio.create_task(service.ended()) for service in self._services]:
                await asyncio.wait(ended, timeout=_SERVICE_GRACE_S)
            for standby in self._standbys.values():
                standby.close()
            self._images.close()
            self._link.close()
        self._progress.line("stopped")
        if self._failure is not None:
            raise self._failure
        return EXIT_OK

    # ------------------------------------------------------------ start

    def _start(self) -> None:
        config, directory = self._config, self._directory
        self._progress.line(
            f"prism_sgl serves {', '.join(config.models)} on "
            + ", ".join(f"{d.name} ({d.kind}, {show_size(d.memory_bytes)})" for d in config.devices)
        )
        for left in directory.swept:
            self._progress.line(f"removed {left}, left by an instance that was killed")
        # Who starts again reads what this instance was started with, whatever has become of models.toml and models.
        checked = directory.path / "config.json"
        save(config, checked)
        for device in config.devices:
            Ledger.create(directory.ledger_path(device.name), device.memory_bytes, device.name).close()
        self._images.start()
        for device in config.devices:
            self._start_standby(device)
        arguments = ["--config", str(checked), "--run-dir", str(directory.path)]
        self._keep("router", lambda: self._start_router(arguments))
        ledgers = ",".join(f"{d.name}={directory.ledger_path(d.name)}" for d in config.devices)
        fd = self._listener.fileno()
        for_api = [*arguments, "--fd", str(fd), "--ledgers", ledgers]
        self._api = self._keep(
            "api_server", lambda: self._child("api_server", self._programs.api_server, for_api, fds=[fd])
        )

    def _start_router(self, arguments: list[str]) -> Child:
        child = self._child("router", self._programs.router, arguments)
        self._link.connect()
        self._say_hello()
        return child

    def _start_standby(self, device: DeviceConfig) -> None:
        link = self._standbys[device.name] = StandbyLink(device, self._shares[device.name], self._on_standby)
        name = f"standby-{device.name}"

        async def gone(reason: str) -> None:
            link.close()
            await self._lose_runtimes(device, f"its standby ended ({reason})")

        self._keep(name, lambda: link.start(self._programs.standby, env=self._env, log=self._log(name)), gone)

    def _keep(
        self, name: str, start: Callable[[], Child], gone: Callable[[str], Awaitable[None]] | None = None
    ) -> Service:
        service = Service(
            name,
            start,
            gone,
            run_dir=self._directory,
            progress=self._progress,
            log=self._log(name),
            fail=self._fail,
        )
        self._services.append(service)
        service.begin()
        return service

    def _child(self, name: str, module: str, arguments: list[str], fds: Sequence[int] = ()) -> Child:
        return start_child(name, module, arguments, env=self._env, log=self._log(name), fds=fds)

    def _log(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def _logs(self) -> list[Path]:
        return [self._log(service.name) for service in self._services] + self._runtime_logs()

    def _runtime_logs(self) -> list[Path]:
        return [Path(runtime.spec.log_path) for runtime in self._runtimes.values()]

    # ------------------------------------------------------------ messages

    def _say_hello(self) -> None:
        self._link.send(SupervisorHello(alive=list(self._runtimes)))

    def _on_router(self, message: RouterToSupervisor) -> None:
        match message:
            case Introduce():
                self._say_hello()
            case StartRuntime():
                self._start_runtime(message)
            case StopRuntime():
                self._stop_runtime(message.runtime, message.reason)

    def _start_runtime(self, wanted: StartRuntime) -> None:
        if wanted.runtime in self._runtimes or self._stop.is_set():
            return
        model = self._config.models.get(wanted.model)
        device = next((d for d in self._config.devices if d.name == wanted.device), None)
        if model is None or device is None:
            reason = f"no model {wanted.model} or no device {wanted.device} in {self._config.file}"
            self._link.send(RuntimeExited(runtime=wanted.runtime, reason=reason))
            return
        ledger_path = self._directory.ledger_path(device.name)
        spec = build_spec(self._config, wanted.runtime, model, device, self._directory.path, ledger_path)
        begin_log(Path(spec.log_path), living=self._runtime_logs())
        self._runtimes[wanted.runtime] = Runtime(spec)
        self._progress.line(f"{wanted.runtime}: starts")
        self._progress.watch(spec.run_dir, wanted.runtime)
        self._standbys[device.name].spawn(spec)

    def _stop_runtime(self, name: RuntimeId, reason: str) -> None:
        runtime = self._runtimes.get(name)
        if runtime is None:
            self._link.send(RuntimeExited(runtime=name, reason="was not running", expected=True))
        elif runtime.kill_reason is None:
            runtime.kill_reason = reason
            self._progress.line(f"{name}: stops ({reason})")
            self._standbys[runtime.spec.device].kill(name, _KILL_GRACE_S)

    def _on_standby(self, device: DeviceConfig, message: StandbyToSupervisor) -> None:
        match message:
            case StandbyReady():
                self._progress.line(f"standby-{device.name}: imports {message.seconds:.1f} s")
            case Spawned():
                self._directory.record(message.pid, str(message.runtime))
                if runtime := self._runtimes.get(message.runtime):
                    runtime.pid = message.pid
            case WorkerExited():
                self._directory.forget(message.pid)
                if runtime := self._runtimes.get(message.runtime):
                    code, log = message.exit_code, Path(runtime.spec.log_path)
                    meant = runtime.kill_reason is not None
                    error = "" if meant else why_ended(code, log, served=runtime.ready)
                    self._lose(runtime, describe_exit(code), error)

    async def _lose_runtimes(self, device: DeviceConfig, reason: str) -> None:
        lost = [runtime for runtime in self._runtimes.values() if runtime.spec.device == device.name]
        pids = [runtime.pid for runtime in lost if runtime.pid is not None]
        await asyncio.to_thread(end_sessions, pids)
        for runtime in lost:
            if runtime.pid is not None:
                self._directory.forget(runtime.pid)
            self._lose(runtime, reason)

    def _lose(self, runtime: Runtime, reason: str, error: str = "") -> None:
        spec, expected = runtime.spec, runtime.kill_reason is not None
        exited = RuntimeExited(runtime=spec.runtime, reason=reason, error=error, expected=expected)
        self._runtimes.pop(spec.runtime, None)
        self._progress.forget(spec.runtime)
        remove_files(spec)
        if spec.device_kind == "host":
            # Its memory has died with it. Runtimes reap when they need room, but there may be none of them. When the
            # memory of a card is free only its driver can tell.
            with Ledger.open(spec.ledger_path) as ledger:
                ledger.reap(None)
        self._progress.line(f"{spec.runtime}: ended ({runtime.kill_reason or exited.whole_reason})")
        self._link.send(exited)
        if not runtime.ready and not expected:
            self._readiness.settle(spec.model, f"failed: {exited.whole_reason}")
        if not self._runtimes:
            self._none_left.set()

    # ------------------------------------------------------------ ready

    async def _tick(self) -> None:
        self._readiness.begin()
        while True:
            for name in self._progress.poll():
                if runtime := self._runtimes.get(name):
                    runtime.ready = True
                    self._readiness.settle(runtime.spec.model, f"ready on {runtime.spec.device}")
            await asyncio.sleep(_POLL_PHASES_S)

    # ------------------------------------------------------------ stop

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals == 1:
            self._progress.line(
                "stopping: answers under way are finished first; a second signal stops at once"
            )
            self._stop.set()
        else:
            self._stop_at_once.set()

    def _fail(self, error: BaseException) -> None:
        """Something of ours is broken: what we believe may be untrue by now, so all of it ends."""
        if self._failure is None:
            self._failure = error
            self._progress.line(f"supervisor: {type(error).__name__}: {error}; stopping")
            self._stop.set()

    async def _stop_in_order(self) -> None:
        ordered = asyncio.create_task(self._drain_and_kill())
        at_once = asyncio.create_task(self._stop_at_once.wait())
        await asyncio.wait({ordered, at_once}, return_when=asyncio.FIRST_COMPLETED)
        for task in (ordered, at_once):
            task.cancel()
        await asyncio.gather(ordered, at_once, return_exceptions=True)

    async def _drain_and_kill(self) -> None:
        self._listener.close()
        # The router stays: requests under way may still need its grants.
        await self._api.stop(signal.SIGTERM, self._config.server.drain_timeout_s)
        for runtime in list(self._runtimes):
            self._stop_runtime(runtime, "the server stops")
        if self._runtimes:
            self._none_left.clear()
            try:
                await asyncio.wait_for(self._none_left.wait(), _KILL_GRACE_S + _SERVICE_GRACE_S)
            except TimeoutError:
                self._progress.line(f"{', '.join(self._runtimes)}: did not stop in time, killed")
        for standby in self._standbys.values():
            standby.close()  # which is how a standby learns that it shall end
        rest = [service for service in self._services if service is not self._api]
        await asyncio.gather(*(service.stop(signal.SIGTERM, _SERVICE_GRACE_S) for service in rest))
