"""A standby whose waiting workers are tiny: ``python -m tests.engine.programs.tiny_room FD FIRST EXPECTED CORES``."""

from __future__ import annotations

import logging
import os
import socket
import sys

from prism_sgl.engine.processes import adopt_orphans
from prism_sgl.engine.standby import Standby
from prism_sgl.engine.waiting_room import WaitingRoom


def main() -> None:
    fd, first, expected, cores = map(int, sys.argv[1:])
    adopt_orphans()
    logging.basicConfig(level=logging.INFO)
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    command = [sys.executable, "-m", "tests.engine.programs.tiny_waiting"]
    Standby(channel, WaitingRoom(command, os.environ, first=first, expected=expected, cores=cores)).run()


if __name__ == "__main__":
    main()
