"""Stands in for the api_server: answers every connection on the inherited socket with its pid."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--config", "--run-dir", "--ledgers"):
        parser.add_argument(name, required=True)
    parser.add_argument("--fd", type=int, required=True)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listener = socket.socket(fileno=given.fd)
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(f"{os.getpid()} {os.environ['TMPDIR']} {given.ledgers}".encode())


if __name__ == "__main__":
    main()
