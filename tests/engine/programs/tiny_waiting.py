"""Stands in for prism_sgl.engine.waiting: what it would import, and how that ends, the test says over a socket.

It tells its pid, then obeys: ``imported``, ``fail REASON``, ``babble BYTES``, ``exit CODE``. Given a spec it
tells whose, and lives on beside a child of its own; a model whose env has DEAF does not hear SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys

from prism_sgl.engine.processes import die_with_parent, log_to
from prism_sgl.messages import Imported, ImportsFailed, decode_standby_to_waiting, encode_json


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    given = parser.parse_args()
    die_with_parent(given.parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = socket.socket(fileno=given.fd)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.connect(os.environ["TINY_CONTROL"])
    control.send(str(os.getpid()).encode())
    verb, _, rest = control.recv(1000).decode().partition(" ")
    match verb:
        case "fail":
            channel.send(encode_json(ImportsFailed(reason=rest)))
            sys.exit(1)
        case "babble":
            channel.send(rest.encode())
            channel.recv(1)  # until the standby has enough of it
            sys.exit(1)
        case "exit":
            os._exit(int(rest))
    channel.send(encode_json(Imported(seconds=0.5)))
    data = channel.recv(1 << 20)
    if not data:
        return
    task = decode_standby_to_waiting(data)
    channel.close()
    if "DEAF" in task.spec.env:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log_to(task.spec.log_path)
    child = subprocess.Popen(["sleep", "1000"])
    control.send(f"{task.spec.runtime} {child.pid}".encode())
    child.wait()


if __name__ == "__main__":
    main()
