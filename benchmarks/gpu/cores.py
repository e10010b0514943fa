"""Which cores engines run on that are measured in turn: the same ones for all.

A prefill of one request is bound by how fast Python launches kernels, so by the core that the scheduler is on. Engines
left to themselves stay where they happened to start: the first tokens of two plain engines then were up to 17 % apart
(docs/benchmarks.md, "Overhead").
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.children import Engine
from benchmarks.gpu.session import say

SCHEDULER, DETOKENIZER = "sglang::scheduler", "sglang::detokenizer"  # how SGLang's children name themselves
# The scheduler's own loop; its other threads (CUDA's, ZeroMQ's); the tokenizer's process; the detokenizer's.
ROLES = ("scheduler", "scheduler's threads", "tokenizer", "detokenizer")


def share_cores(engines: Sequence[Engine]) -> None:
    """Bind each role of every engine to one core, the same for all engines. For such as never work at once.

    Raises:
        RuntimeError: an engine shows no scheduler or detokenizer. All its processes would share one core, which cost
            1 to 2 % of the throughput at full load (H200, 2026-11-29): the comparison would be void.
    """
    cores = one_cpu_a_core(thread_siblings(), len(ROLES))
    if cores is None:
        say(f"engines run where the system puts them: {len(ROLES) + 1} cores are needed to bind them")
        return
    say("engines are bound to CPUs: " + ", ".join(f"{r} {c}" for r, c in zip(ROLES, cores, strict=True)))
    for engine in engines:
        titles = {pid: title(pid) for pid in engine.pids}
        for role in (SCHEDULER, DETOKENIZER):
            if not any(shown.startswith(role) for shown in titles.values()):
                raise RuntimeError(f"{engine.name}: none of {titles} is {role}")
        for pid, shown in titles.items():
            bind(pid, shown, cores)


def one_cpu_a_core(siblings: Mapping[int, frozenset[int]], count: int) -> list[int] | None:
    """The lowest CPU of each of ``count`` cores; not of the first core, where the system's interrupts arrive.

    ``siblings``: of each CPU, all CPUs of its core. None: there are fewer cores.
    """
    lowest = sorted({min(together) for together in siblings.values()})[1:]
    return lowest[:count] if len(lowest) >= count else None


def thread_siblings() -> dict[int, frozenset[int]]:
    """Of each CPU that this process may use, the CPUs of the same core, itself included."""
    found = {}
    for cpu in os.sched_getaffinity(0):
        listed = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found[cpu] = _cpu_list(listed.read_text()) if listed.exists() else frozenset((cpu,))
    return found


def bind(pid: int, shown: str, cores: Sequence[int]) -> None:
    """All threads that the process has now; those that they start inherit it.

    ``shown``: its title, which says what it is. ``cores`` in the order of ``ROLES``.
    """
    loop, threads, tokenizer, detokenizer = cores
    for thread in map(int, os.listdir(f"/proc/{pid}/task")):
        if shown.startswith(SCHEDULER):
            core = loop if thread == pid else threads
        else:
            core = detokenizer if shown.startswith(DETOKENIZER) else tokenizer
        os.sched_setaffinity(thread, (core,))


def title(pid: int) -> str:
    """What ``ps`` shows."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def _cpu_list(text: str) -> frozenset[int]:
    """``0-1,8`` as the kernel writes it."""
    ranges = (part.partition("-") for part in text.strip().split(","))
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))
