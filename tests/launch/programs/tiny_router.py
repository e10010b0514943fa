"""Stands in for the router: starts each model once on the first device, and logs what the supervisor says."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from zmq.constants import SocketType
from zmq.sugar.context import Context

from prism_sgl import addresses
from prism_sgl.config import restore
from prism_sgl.messages import (
    Introduce,
    RuntimeExited,
    RuntimeId,
    StartRuntime,
    StopRuntime,
    SupervisorHello,
    decode_supervisor_to_router,
    encode,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--run-dir")
    given = parser.parse_args()
    config = restore(given.config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    socket = Context().socket(SocketType.ROUTER)
    socket.bind(addresses.router_for_supervisor(given.run_dir))
    num_started = 0
    while True:
        identity, frame = socket.recv_multipart()
        message = decode_supervisor_to_router(frame)
        print(f"{os.getpid()} {message}", flush=True)
        alive = set(message.alive) if isinstance(message, SupervisorHello) else set()
        if alive and not num_started:  # started again: one of those that it is told of is stopped, to be seen
            told = " ".join(sorted(alive))
            stop = StopRuntime(
                runtime=RuntimeId(max(alive)), reason=f"router {os.getpid()} was told of {told}"
            )
            socket.send_multipart([identity, encode(stop)])
        wanted = (
            [message.runtime.split("@")[0]] if isinstance(message, RuntimeExited) else list(config.models)
        )
        for model in wanted:
            if not any(runtime.startswith(f"{model}@") for runtime in alive):
                num_started += 1
                runtime = RuntimeId(f"{model}@{config.devices[0].name}.{num_started}")
                start = StartRuntime(runtime=runtime, model=model, device=config.devices[0].name)
                socket.send_multipart([identity, encode(start)])
                socket.send_multipart([identity, encode(start)])  # a doubled message starts nothing twice
        if isinstance(message, SupervisorHello) and not alive:
            socket.send_multipart([identity, b"no message"])
            socket.send_multipart([identity, encode(Introduce(epoch=1))])


if __name__ == "__main__":
    main()
