"""What this machine has, read from its files: no driver call, no command, so that it costs nothing to ask."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

LINGER_FOLDER = Path("/var/lib/systemd/linger")


def memory_bytes() -> int:
    """MemTotal of the host."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no MemTotal line")


def num_gpus() -> int:
    """NVIDIA GPUs that the kernel driver has; 0 without a driver."""
    try:
        return sum(1 for _ in Path("/proc/driver/nvidia/gpus").iterdir())
    except OSError:
        return 0


def user_lingers() -> bool:
    """systemd keeps what belongs to this user when the last session ends (``loginctl enable-linger``)."""
    try:
        return (LINGER_FOLDER / pwd.getpwuid(os.getuid()).pw_name).exists()
    except (KeyError, OSError):  # a user without a name, as in containers
        return False
