"""The router process: carries events to the Controller and its commands out, and decides nothing itself.

``python -m prism_sgl.launch.router --config FILE --run-dir DIR``; FILE as config.save() has written it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import uvloop
import zmq

from prism_sgl import addresses
from prism_sgl.config import Config, restore
from prism_sgl.frame_socket import FrameSocket
from prism_sgl.messages import (
    DECODE_ERRORS,
    Abandon,
    AdminReply,
    Grant,
    Message,
    decode_api_to_router,
    decode_runtime_to_router,
    decode_supervisor_to_router,
    encode,
)
from prism_sgl.schedulers.controller import (
    Controller,
    Event,
    FromApi,
    FromRuntime,
    FromSupervisor,
    Tick,
    ToApi,
    ToRuntime,
    ToSupervisor,
)

log = logging.getLogger(__name__)

_STATUS_EVERY_S = 1.0
_STATUS_AT_MOST_EVERY_S = 0.05
_TIMER_SLACK_S = 0.001
_SUPERVISOR = b"supervisor"
M = TypeVar("M", bound=Message)


def call_later(
    loop: asyncio.AbstractEventLoop, wait_s: float, action: Callable[[], None]
) -> asyncio.TimerHandle:
    """After a millisecond at least: for less, uvloop gives a handle that does not know when it runs."""
    return loop.call_later(max(wait_s, 0.001), action)


class Router:
    """Owner of the Controller and of the three sockets. Everything happens on one loop."""

    def __init__(self, config: Config, run_dir: str) -> None:
        self.undecodable = 0
        self.undeliverable = 0
        self._controller = Controller(config, epoch=next_epoch(run_dir))
        self._run_dir = run_dir
        self._unreachable: set[tuple[str, bytes]] = set()
        self._status_at = 0.0
        self._moves_told = -1
        self._status_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._apis = self._bind(addresses.router_for_apis(self._run_dir), self._from_api)
        self._runtimes = self._bind(addresses.router_for_runtimes(self._run_dir), self._from_runtime)
        self._supervisor = self._bind(addresses.router_for_supervisor(self._run_dir), self._from_supervisor)
        self._tick()

    def stop(self) -> None:
        for timer in (self._status_timer, self._tick_timer):
            if timer is not None:
                timer.cancel()
        for socket in (self._apis, self._runtimes, self._supervisor):
            socket.close()
        self._context.term()

    def _bind(self, address: str, on_frames: Callable[[list[bytes]], None]) -> FrameSocket:
        socket = FrameSocket(self._context, zmq.ROUTER, on_frames, on_read=self._settle)
        socket.bind(address)
        return socket

    # ------------------------------------------------------------ events in

    def _from_api(self, frames: list[bytes]) -> None:
        if (message := self._decode(decode_api_to_router, frames)) is not None:
            self._handle(FromApi(frames[0].decode(errors="replace"), message))

    def _from_runtime(self, frames: list[bytes]) -> None:
        if (message := self._decode(decode_runtime_to_router, frames)) is not None:
            self._handle(FromRuntime(message))

    def _from_supervisor(self, frames: list[bytes]) -> None:
        if (message := self._decode(decode_supervisor_to_router, frames)) is not None:
            self._handle(FromSupervisor(message))

    def _decode(self, decode: Callable[[bytes], M], frames: list[bytes]) -> M | None:
        if len(frames) == 2:
            try:
                return decode(frames[1])
            except DECODE_ERRORS:
                pass
        self.undecodable += 1
        if self.undecodable == 1:
            log.warning("dropped a frame of %r that does not decode; more are only counted", frames[0][:80])
        return None

    def _handle(self, event: Event) -> None:
        now = time.monotonic()
        lost: list[ToApi] = []
        for command in self._controller.handle(event, now):
            message = encode(command.message)
            match command:
                case ToApi(api=api):
                    if isinstance(command.message, AdminReply):
                        self._tell_status()  # first: who is told "done" must not read the state before
                    if not self._send(self._apis, "api_server", api.encode(), message):
                        lost.append(command)
                case ToRuntime(runtime=runtime):
                    self._send(self._runtimes, "runtime", runtime.encode(), message)
                case ToSupervisor():
                    self._send(self._supervisor, "supervisor", _SUPERVISOR, message)
        for command in lost:
            # An api_server that has died cannot obey: the place goes to somebody else at once.
            if isinstance(command.message, Grant):
                self._handle(FromApi(command.api, Abandon(request=command.message.request)))

    def _send(self, socket: FrameSocket, kind: str, peer: bytes, message: bytes) -> bool:
        if socket.send((peer, message)):
            return True
        self.undeliverable += 1
        if (kind, peer) not in self._unreachable:
            self._unreachable.add((kind, peer))
            log.warning("%s %s cannot be reached; said once", kind, peer.decode(errors="replace"))
        return False

    # ------------------------------------------------------------ time

    def _tick(self) -> None:
        self._tick_timer = None
        self._handle(Tick())
        self._settle()

    def _settle(self) -> None:
        """After a batch of events: tell of what changed, and when to look again."""
        now = time.monotonic()
        # A timer that is set for earlier stays: to tick once too often costs less than to set it for each event.
        wait_s = self._controller.next_tick(now)
        if wait_s is not None:
            timer = self._tick_timer
            if timer is None or timer.when() > self._loop.time() + wait_s + _TIMER_SLACK_S:
                if timer is not None:
                    timer.cancel()
                self._tick_timer = call_later(self._loop, wait_s, self._tick)
        changed = self._controller.num_moves != self._moves_told
        due_at = self._status_at + (_STATUS_AT_MOST_EVERY_S if changed else _STATUS_EVERY_S)
        if now >= due_at:
            self._tell_status()
        elif self._status_timer is None or self._status_timer.when() > self._loop.time() + due_at - now:
            self._set_status_timer(due_at - now)

    def _set_status_timer(self, wait_s: float) -> None:
        if self._status_timer is not None:
            self._status_timer.cancel()
        self._status_timer = call_later(self._loop, wait_s, self._tell_status)

    def _tell_status(self) -> None:
        now = time.monotonic()
        self._moves_told = self._controller.num_moves
        self._status_at = now
        if apis := self._controller.apis:
            status = msgspec.structs.replace(self._controller.status(now), undecodable=self.undecodable)
            message = encode(status)
            for api in apis:
                self._send(self._apis, "api_server", api.encode(), message)
        self._set_status_timer(_STATUS_EVERY_S)


def next_epoch(run_dir: str) -> int:
    """One more than the last router of this instance had: its runtimes' ids must not come again."""
    file = Path(run_dir) / "epoch"
    try:
        epoch = int(file.read_text()) + 1
    except FileNotFoundError:
        epoch = 1
    except (OSError, ValueError):
        log.warning("%s cannot be read; counting goes on from the time of day", file)
        epoch = int(time.time())
    fresh = file.with_suffix(".new")
    fresh.write_text(str(epoch))
    fresh.replace(file)
    return epoch


async def run_router(config: Config, run_dir: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    router = Router(config, run_dir)
    router.start()
    print("router: ready", flush=True)
    try:
        await stop.wait()
    finally:
        router.stop()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_sgl.launch.router")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--run-dir", required=True, metavar="DIR")
    given = parser.parse_args()
    config = restore(given.config)
    logging.basicConfig(
        level=config.server.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    uvloop.run(run_router(config, given.run_dir))


if __name__ == "__main__":
    main()
