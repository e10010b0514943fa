"""Stands in for the standby: speaks its messages; a worker is a process that only waits.

A model whose engine_args say ``fail`` gets a worker that ends with that text.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys

from prism_sgl import addresses
from prism_sgl.messages import (
    Kill,
    Spawn,
    Spawned,
    StandbyReady,
    WorkerExited,
    decode_supervisor_to_standby,
    encode_json,
)

# The worker has a child of its own in the same session, as SGLang's engines have. It says that it is ready
# once its death signal is set, as the real one's is long before.
_WORKER = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
if len(sys.argv) > 3:
    raise RuntimeError(sys.argv[3])
child = subprocess.Popen(["sleep", "1000"])
with open(sys.argv[2], "a") as phases:
    phases.write("load_weights 0.25\\nready 0.5\\n")
child.wait()
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("--waiting", required=True)
    parser.add_argument("--expected", required=True)
    parser.add_argument("--cores", required=True)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ended by the socket, as the real one
    channel = socket.socket(fileno=given.fd)
    channel.send(encode_json(StandbyReady(seconds=0.1)))
    workers: dict[str, subprocess.Popen[bytes]] = {}
    while frame := channel.recv(1 << 20):
        message = decode_supervisor_to_standby(frame)
        match message:
            case Spawn(spec=spec):
                fail = [str(spec.engine_args["fail"])] if "fail" in spec.engine_args else []
                phases = addresses.phases(spec.run_dir, spec.runtime)
                arguments = [str(os.getpid()), phases, *fail]
                with open(spec.log_path, "ab") as log:
                    worker = subprocess.Popen(
                        [sys.executable, "-c", _WORKER, *arguments],
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                channel.send(encode_json(Spawned(runtime=spec.runtime, pid=worker.pid)))
                if fail:
                    code = worker.wait()
                    channel.send(
                        encode_json(WorkerExited(runtime=spec.runtime, pid=worker.pid, exit_code=code))
                    )
                    continue
                workers[spec.runtime] = worker
            case Kill(runtime=runtime):
                worker = workers.pop(runtime)
                os.killpg(worker.pid, signal.SIGKILL)
                code = worker.wait()
                channel.send(encode_json(WorkerExited(runtime=runtime, pid=worker.pid, exit_code=code)))


if __name__ == "__main__":
    main()
