"""The HTTP side: takes any SGLang or OpenAI request, keeps its body, and relays the answer of a runtime.

``python -m prism_sgl.launch.api_server --config FILE --run-dir DIR [--fd N] [--ledgers DEVICE=PATH,...]``
FILE: as config.save() has written it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn
import uvloop
from uvicorn._types import ASGIApplication

from prism_sgl.config import Config, restore
from prism_sgl.launch.answers import Answers
from prism_sgl.launch.forwarding import Forwarder
from prism_sgl.launch.front import Front
from prism_sgl.launch.http1 import Http1Protocol
from prism_sgl.launch.ledger_reader import LedgerReader, parse_ledgers
from prism_sgl.launch.listen import listen
from prism_sgl.launch.metrics import Metrics
from prism_sgl.messages import Status

_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they close them, not we
_BACKLOG = 1024


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn raises a signal again once it has ended; ours end the process in order."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        yield

    def _on_signal(self) -> None:
        self.force_exit = self.should_exit  # a second signal
        self.should_exit = True


async def run_api_server(config: Config, run_dir: str, listener: socket.socket, ledgers: str = "") -> None:
    """Serve until SIGTERM; then answers under way are finished, for the time-out of a drain at most."""
    # A name that no earlier api_server had: what runtimes still answer for a dead one must not reach us.
    api = f"api-{os.getpid():x}{secrets.token_hex(3)}"

    def told(status: Status) -> None:
        answers.told(status)
        metrics.told(status)

    forwarder = Forwarder(api, run_dir, on_status=told)
    reader = LedgerReader(parse_ledgers(ledgers))
    metrics = Metrics(reader, lambda: forwarder.undecodable)
    answers = Answers(config, forwarder, metrics, reader)
    front = Front(config, forwarder, answers, metrics)
    server = _Server(
        uvicorn.Config(
            cast(ASGIApplication, front),
            loop="none",
            http=Http1Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, int(config.server.drain_timeout_s)),
        )
    )
    forwarder.start()
    # What the start has made stays: no need to look through it for garbage while requests wait.
    gc.collect()
    gc.freeze()
    print(f"api_server: ready on port {listener.getsockname()[1]}", flush=True)
    try:
        await server.serve(sockets=[listener])
    finally:
        forwarder.stop()
        reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m prism_sgl.launch.api_server")
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--run-dir", required=True, metavar="DIR")
    parser.add_argument("--fd", type=int, help="a listening socket that was inherited")
    parser.add_argument("--ledgers", default="", metavar="DEVICE=PATH,...")
    given = parser.parse_args()
    config = restore(given.config)
    level = config.server.log_level.upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLevelName(level)))
    if given.fd is not None:
        listener = socket.socket(fileno=given.fd)
    else:
        listener = listen(config.server.host, config.server.port, file=config.file)
    uvloop.run(run_api_server(config, given.run_dir, listener, given.ledgers))


if __name__ == "__main__":
    main()
