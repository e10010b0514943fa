"""What this machine has, read from /proc: no driver call, no command, so that it costs nothing to ask."""

from __future__ import annotations

from pathlib import Path


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
