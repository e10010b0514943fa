"""One runtime: an SGLang engine and its FastAPI app behind ZeroMQ, no TCP port of its own.

The app runs in this process through ASGI (bridge.py), so every inference endpoint works unchanged. The router
commands sleep, wake and quota; the scheduler process carries them out (control.py). Started by the standby,
or by hand: ``python -m prism_sgl.engine.worker SPEC.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import uvloop
import zmq
import zmq.asyncio

from prism_sgl import addresses, messages
from prism_sgl.engine import spec as spec_channel
from prism_sgl.engine.first_tokens import FirstTokenListener
from prism_sgl.errors import PrismError
from prism_sgl.messages import (
    AskHello,
    Finished,
    FirstToken,
    Hello,
    Load,
    RuntimeSpec,
    RuntimeState,
    RuntimeToRouter,
    SetQuota,
    Sleep,
    SleepRefused,
    Slept,
    Started,
    Wake,
    WakeFailed,
    Woke,
)

if TYPE_CHECKING:
    from prism_sgl.engine.early_children import EarlyChildren

log = logging.getLogger(__name__)

_LOAD_EVERY_S = 0.25  # looked at; sent when changed
_BEAT_EVERY_S = 1.0  # sent at least
_SHOWN_S = 0.1  # a part of the start that took less is not worth a line
_WAKE_TIMEOUT_S = 5.0  # then the router frees room and asks again


class PhaseLog:
    """Seconds of each phase of the start, for the supervisor's progress lines (addresses.phases).

    ``began_s`` (monotonic) is when the runtime was wanted, which may be before there was a process for it.
    """

    def __init__(self, spec: RuntimeSpec, began_s: float) -> None:
        self._path = Path(addresses.phases(spec.run_dir, spec.runtime))
        self._since = began_s
        self._began = began_s

    def done(self, phase: str) -> None:
        now = time.monotonic()
        self._write(phase, now - self._since)
        self._since = now

    def part(self, phase: str, part: str, seconds: float) -> None:
        """Of a phase that is done. One that took no time to speak of is not shown."""
        if seconds >= _SHOWN_S:
            self._write(f"{phase}, of which {part}", seconds)

    def ready(self) -> float:
        total = time.monotonic() - self._began
        self._write("ready", total)
        return total

    def _write(self, phase: str, seconds: float) -> None:
        with self._path.open("a") as file:
            file.write(f"{phase} {seconds:.2f}\n")


class Worker:
    """Owns this runtime's state; everything happens on one loop."""

    def __init__(self, spec: RuntimeSpec, phases: PhaseLog, early: EarlyChildren | None) -> None:
        from prism_sgl.allocator.ledger import Ledger
        from prism_sgl.engine.launching import start_engine

        self.spec = spec
        self.phases = phases
        self.state = RuntimeState.STARTING
        self.engine = start_engine(spec, early)
        phases.done("engine")
        for part, seconds in self.engine.phases.items():
            phases.part("engine", part, seconds)
        self.ledger = Ledger.open(spec.ledger_path)
        self.start_s = 0.0
        self._undecodable = 0

    async def run(self) -> None:
        """Serve until SIGTERM."""
        from prism_sgl.engine.bridge import AsgiBridge
        from prism_sgl.engine.control import SchedulerControl
        from prism_sgl.engine.launching import app_lifespan
        from prism_sgl.engine.warm_up import warm_up

        stop = asyncio.Event()
        async with app_lifespan(self.engine):
            self.engine.tokenizer_manager.auto_create_handle_loop()
            # SGLang's own handler drains in steps of five seconds; draining is the router's business here.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            # SGLang's watchdog says with SIGQUIT that a child is gone, and its handler then takes five seconds for
            # diagnostics. The standby ends what is left of our session, and the model is back sooner.
            asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, self._engine_died)
            context = zmq.asyncio.Context()
            self.router = context.socket(zmq.DEALER)
            self.router.setsockopt(zmq.IDENTITY, self.spec.runtime.encode())
            self.router.setsockopt(zmq.LINGER, 0)
            self.router.setsockopt(zmq.SNDHWM, 0)
            self.router.connect(addresses.router_for_runtimes(self.spec.run_dir))
            self.control = SchedulerControl(self.engine.rpc_ipc_name)
            self.bridge = AsgiBridge(self.engine.app, self.spec.runtime, self.spec.run_dir, self.report)
            first_tokens = FirstTokenListener(addresses.first_tokens(self.spec.run_dir, self.spec.runtime))
            async with self.bridge:
                asyncio.get_running_loop().add_reader(first_tokens, self._on_first_tokens, first_tokens)
                if self.spec.device_kind == "cuda":
                    await warm_up(self.engine.tokenizer_manager, self.engine.facts)
                    self.phases.done("warm-up")
                self.state = RuntimeState.AWAKE
                self.start_s = self.phases.ready()
                self.report(self.hello())
                tasks = [asyncio.create_task(self._obey()), asyncio.create_task(self._beat())]
                stopped = asyncio.create_task(stop.wait())
                await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()  # a broken loop ends the runtime with its traceback

    def report(self, message: RuntimeToRouter | Started | FirstToken | Finished) -> None:
        # SNDHWM 0: never blocks; if the router is down, the events wait in the socket for the next one.
        self.router.send(messages.encode(message), zmq.NOBLOCK)

    def hello(self) -> Hello:
        return Hello(
            runtime=self.spec.runtime,
            model=self.spec.model,
            device=self.spec.device,
            state=self.state,
            facts=self.engine.facts,
            running=self.bridge.running,
            start_s=self.start_s,
        )

    def _on_first_tokens(self, listener: FirstTokenListener) -> None:
        total = listener.read()
        if total is not None:
            self.bridge.prefilled(total)

    async def _obey(self) -> None:
        """Commands of the router, one after the other."""
        while True:
            frame = await self.router.recv()
            try:
                command = messages.decode_router_to_runtime(frame)
            except messages.DECODE_ERRORS:
                self._undecodable += 1
                log.warning("dropped a frame of %d bytes from the router", len(frame))
                continue
            match command:
                case AskHello():
                    self.report(self.hello())
                case Sleep(keep_weights=keep_weights, preempt=preempt):
                    await self._sleep(keep_weights, preempt)
                case Wake():
                    await self._wake()
                case SetQuota(floor_bytes=floor, ceiling_bytes=ceiling):
                    await self.control.set_quota(floor, ceiling)

    async def _sleep(self, keep_weights: bool, preempt: bool) -> None:
        from prism_sgl.engine.control import EngineBusyError, SchedulerCallError

        runtime = self.spec.runtime
        if self.bridge.running and not preempt:
            self.report(SleepRefused(runtime=runtime, reason="requests are being answered"))
            return
        self.bridge.awake = False
        try:
            seconds = await self.control.sleep(keep_weights=keep_weights, preempt=preempt)
        except EngineBusyError as busy:
            self.bridge.awake = True
            self.report(SleepRefused(runtime=runtime, reason=str(busy)))
        except SchedulerCallError as error:
            _end(f"could not sleep: {error}")
        else:
            self.state = RuntimeState.ASLEEP
            self.report(self._load())  # what it holds now, before the state that follows from it
            self.report(Slept(runtime=runtime, seconds=seconds))

    async def _wake(self) -> None:
        from prism_sgl.engine.control import EngineShortError, SchedulerCallError

        runtime = self.spec.runtime
        self.state = RuntimeState.WAKING
        try:
            seconds = await self.control.wake(_WAKE_TIMEOUT_S)
        except EngineShortError as shortage:
            self.state = RuntimeState.ASLEEP
            self.report(WakeFailed(runtime=runtime, reason=str(shortage)))
        except SchedulerCallError as error:
            _end(f"could not wake: {error}")
        else:
            self.state = RuntimeState.AWAKE
            self.bridge.awake = True
            self.report(self._load())
            self.report(Woke(runtime=runtime, seconds=seconds))

    async def _beat(self) -> None:
        """Tell the router what this runtime holds and wants, as the ledger has it."""
        last: Load | None = None
        sent_at = 0.0
        while True:
            load = self._load()
            now = time.monotonic()
            if load != last or now - sent_at >= _BEAT_EVERY_S:
                self.report(load)
                last, sent_at = load, now
            await asyncio.sleep(_LOAD_EVERY_S)

    def _load(self) -> Load:
        from prism_sgl.allocator.vmm import GRANULE_BYTES

        mine = next((o for o in self.ledger.owners() if o.name == self.spec.runtime and o.alive), None)
        return Load(
            runtime=self.spec.runtime,
            state=self.state,
            weights_bytes=mine.weights * GRANULE_BYTES if mine else 0,
            kv_bytes=mine.kv * GRANULE_BYTES if mine else 0,
            wanted_bytes=mine.wanted * GRANULE_BYTES if mine else 0,
            in_flight=len(self.bridge.running),
        )

    def _engine_died(self) -> None:
        # A scheduler that has caught an exception says so before it ends, and its error stands above.
        _end(self.engine.who_ended())


def _end(reason: str) -> NoReturn:
    """At once: the engine is not to be used any more. Its memory comes back with its processes, which the standby ends.

    Clients and operators read ``reason``, if there is one: it is the last error in the log.
    """
    if reason:
        log.error("EngineError: %s", reason)
    os._exit(1)


def serve(spec: RuntimeSpec, *, wanted_at_s: float | None = None, early: EarlyChildren | None = None) -> None:
    """The whole life of a worker process. Returns at SIGTERM; SGLang's children die with us.

    A worker that has waited brings its children, and counts its start from when the spec was wanted: the phase
    ``imports`` is then what that had to wait for imports, which is nothing if the worker was ready.
    """
    logging.basicConfig(level=spec.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    os.environ.update(spec.env)
    spec_channel.announce_spec(spec)
    phases = PhaseLog(spec, time.monotonic() if wanted_at_s is None else wanted_at_s)
    import sglang.srt.entrypoints.http_server  # noqa: F401  (25 s, unless they were paid before the spec came)

    phases.done("imports")
    try:
        worker = Worker(spec, phases, early)
    except PrismError as error:
        # One line that the supervisor finds at the end of the log: this is the reason that clients read.
        log.error("%s", error)
        raise SystemExit(error.exit_code) from None
    uvloop.run(worker.run())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_sgl.engine.worker", description=__doc__)
    parser.add_argument("spec", help="file with a RuntimeSpec as JSON")
    arguments = parser.parse_args()
    spec = messages.decode_runtime_spec(Path(arguments.spec).read_bytes())
    spec_channel.announce_device_kind(spec.device_kind)
    serve(spec)


if __name__ == "__main__":
    main()
