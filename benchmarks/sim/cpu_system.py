"""Four small models on two host devices of this machine's CPU, live: what benchmarks/sim/validate.py measures.

Each device's engines are bound to a core of their own, so that they share one machine's time as on a card.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from prism_sgl.launch.replay.client import LiveServer, Prompts
from prism_sgl.launch.replay.live import LiveReplay, replay_live
from prism_sgl.schedulers.replay.spec import Arrival, Slo
from tests.engine.system import System, cpu_seconds

MODEL_PATH = Path("~/.cache/prism_sgl/models/smollm2").expanduser()
MODELS = ("alpha", "beta", "gamma", "delta")
DEVICES = 2
FIRST_SLO = Slo(ttft_s=1.0, tpot_s=0.25)
CONTEXT_TOKENS, PASS_TOKENS, MAX_RUNNING = 512, 512, 16
CONFIG = """
[server]
port = {port}
run_dir = "{folder}/run"
log_dir = "{folder}/logs"
[scheduler]
start_parallel = 4
[[devices]]
name = "gpu0"
kind = "host"
memory = "1GiB"
[[devices]]
name = "gpu1"
kind = "host"
memory = "1GiB"
"""
MODEL_CONFIG = """
[models.{name}]
path = "{path}"
slo = {{ ttft_ms = {ttft_ms:g}, tpot_ms = {tpot_ms:g} }}
engine_args = {{ context_length = {context}, chunked_prefill_size = {pass_tokens}, max_running_requests = {running} }}
"""


@contextlib.contextmanager
def live_system() -> Iterator[System]:
    """All four models awake, each device's engines bound to one core."""
    with tempfile.TemporaryDirectory(prefix="pv-", dir="/tmp") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        text = CONFIG.format(port=port, folder=folder)
        for name in MODELS:
            text += MODEL_CONFIG.format(
                name=name,
                path=MODEL_PATH,
                ttft_ms=FIRST_SLO.ttft_s * 1000,
                tpot_ms=FIRST_SLO.tpot_s * 1000,
                context=CONTEXT_TOKENS,
                pass_tokens=PASS_TOKENS,
                running=MAX_RUNNING,
            )
        config = Path(folder) / "models.toml"
        config.write_text(text)
        system = System(config, Path(folder) / "run", Path(folder) / "logs", port)
        try:
            system.wait_ready()
            bind(system)
            yield system
        finally:
            system.stop()


def bind(system: System) -> None:
    """Each runtime's processes and all their threads to the core of their device."""
    cores = sorted(os.sched_getaffinity(0))
    for name in MODELS:
        device = str(system.status(name)["device"])
        core = cores[int(device.removeprefix("gpu")) % len(cores)]
        for pid in processes_of(system.runtime_pids(name)["worker"]):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task), {core})


def processes_of(root: int) -> list[int]:
    """This process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
                parents.setdefault(parent, []).append(int(entry))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


class OtherWork:
    """CPU seconds that processes which are not ours take: a share of all cores over a time."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
        busy_s = (sum(fields) - fields[3] - fields[4]) / ticks  # all but idle and waiting for disks
        ours_s = sum(time_of(pid) for pid in [os.getpid(), *processes_of(self._system.process.pid)])
        return sum(fields) / ticks, busy_s, ours_s

    def share(self) -> float:
        """Since it was made. Of processes of ours that ended meanwhile the time counts as others'."""
        all_s, busy_s, ours_s = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return max(0.0, (busy_s - ours_s) / all_s)


def time_of(pid: int) -> float:
    with contextlib.suppress(OSError):
        return cpu_seconds(pid)
    return 0.0


def play(url: str, arrivals: Sequence[Arrival], seed: int, slo: Slo = FIRST_SLO) -> LiveReplay:
    async def run() -> LiveReplay:
        async with LiveServer(url, {name: name for name in MODELS}, Prompts(seed=seed)) as server:
            await server.check()
            return await replay_live(server, arrivals, dict.fromkeys(MODELS, slo))

    return asyncio.run(run())
