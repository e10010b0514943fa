"""Names of the sockets of one instance: all in its private run directory (0700), all Unix sockets.

Only this module knows how a name becomes an address; messages carry names (runtime and api_server ids).
"""

from __future__ import annotations

from pathlib import Path

from prism_sgl.messages import RuntimeId


def router_for_apis(run_dir: str) -> str:
    """ZeroMQ ROUTER of the router; api_servers connect a DEALER."""
    return f"ipc://{run_dir}/router-api.sock"


def router_for_runtimes(run_dir: str) -> str:
    """ZeroMQ ROUTER of the router; runtimes connect a DEALER whose identity is their runtime id."""
    return f"ipc://{run_dir}/router-rt.sock"


def router_for_supervisor(run_dir: str) -> str:
    """ZeroMQ ROUTER of the router; the supervisor connects a DEALER."""
    return f"ipc://{run_dir}/router-sv.sock"


def runtime_requests(run_dir: str, runtime: RuntimeId) -> str:
    """ZeroMQ ROUTER of one runtime; api_servers connect a DEALER and send Forward."""
    return f"ipc://{run_dir}/rt-{_file_name(runtime)}.sock"


def doorbell(run_dir: str, pid: int) -> str:
    """AF_UNIX datagram socket of the ledger owner in process ``pid``: one byte means "look at your slot"."""
    return str(Path(run_dir) / f"bell-{pid}")


def first_tokens(run_dir: str, runtime: RuntimeId) -> str:
    """AF_UNIX datagram socket of a worker: its scheduler says how many requests have had their first token."""
    return str(Path(run_dir) / f"rt-{_file_name(runtime)}.first")


def image_store(run_dir: str) -> str:
    """AF_UNIX SOCK_SEQPACKET socket of the supervisor's image store (passes memfds)."""
    return str(Path(run_dir) / "images.sock")


def phases(run_dir: str, runtime: RuntimeId) -> str:
    """File to which a starting worker appends ``<phase> <seconds>`` lines; the supervisor shows them."""
    return str(Path(run_dir) / f"rt-{_file_name(runtime)}.phases")


def shared_files(run_dir: str, runtime: RuntimeId) -> str:
    """File in which a worker lists what its engine puts into /dev/shm, one path a line, for who sweeps up."""
    return str(Path(run_dir) / f"rt-{_file_name(runtime)}.shm")


def _file_name(runtime: str) -> str:
    return "".join(c if c.isalnum() or c in "@.-_" else "_" for c in runtime)
