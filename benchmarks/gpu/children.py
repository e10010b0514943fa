"""Engines and other loads, each in a child process of its own (engine_process.py, card_process.py).

So ours, plain SGLang and peers live side by side on one card and start in parallel. A child answers its commands in
order: send to several, then receive from each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine_process import Ask
from benchmarks.gpu.results import ROOT
from benchmarks.gpu.session import say

ENGINE = "benchmarks.gpu.engine_process:EngineHandler"
Action = Mapping[str, Any]

# An rpc that changes nothing: what the way to the scheduler and back costs (Scheduler.is_fully_idle).
EMPTY_RPC: Action = {"name": "is_fully_idle"}
SLEEP: Action = {"name": "prism_sleep", "args": {"keep_weights": False}}
SLEEP_KEEPING_WEIGHTS: Action = {"name": "prism_sleep", "args": {"keep_weights": True}}
WAKE: Action = {"name": "prism_wake", "args": {"timeout_s": 30.0, "wait": False}}
WAKE_AND_WAIT: Action = {"name": "prism_wake", "args": {"timeout_s": 30.0, "wait": True}}


class ChildError(Exception):
    """A child refused a command, died or did not answer in time; the message holds the end of its log."""


class Child:
    """One child process and the line to it."""

    def __init__(
        self, name: str, handler: str, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log_path = log_path
        ours, theirs = socket.socketpair()
        variables = dict(os.environ) | dict(environment or {})
        variables["PYTHONPATH"] = os.pathsep.join(
            part for part in (str(ROOT), variables.get("PYTHONPATH", "")) if part
        )
        command = [sys.executable, "-m", "benchmarks.gpu.engine_process"]
        command += ["--fd", str(theirs.fileno()), "--handler", handler]
        with log_path.open("ab") as log:  # appended: the scheduler writes to the same file by its name
            self.process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd=ROOT,
            )
        theirs.close()
        self._line = ours
        self._buffer = b""
        self._sent = 0
        self._received = 0

    def send(self, verb: str, **args: Any) -> None:
        """Queue a command; its reply comes with the ``receive`` of the same turn."""
        self._sent += 1
        try:
            self._line.sendall(json.dumps({"id": self._sent, "verb": verb, **args}).encode() + b"\n")
        except OSError as error:
            raise self._error(f"does not take {verb}: {error}") from error

    def receive(self, timeout_s: float = 120.0) -> Any:
        """The reply to the oldest command that has none yet.

        Raises:
            ChildError: it failed, the child has died, or nothing came in time.
        """
        if self._received == self._sent:
            raise ValueError(f"{self.name} was asked nothing")
        reply = json.loads(self._read_line(timeout_s))
        self._received += 1
        assert reply["id"] == self._received, (reply["id"], self._received)
        if "error" in reply:
            raise self._error(reply["error"])
        return reply["result"]

    def call(self, verb: str, timeout_s: float = 120.0, **args: Any) -> Any:
        assert self._received == self._sent, f"{self.name} still owes an answer"
        self.send(verb, **args)
        return self.receive(timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """End it and everything below it, politely if it listens."""
        with contextlib.suppress(ChildError, OSError, ValueError):
            self.send("close")
        self._line.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _read_line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._line], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._error(f"no answer in {timeout_s:.0f} s")
            try:
                data = self._line.recv(1 << 20)
            except OSError as error:
                raise self._error(str(error)) from error
            if not data:
                raise self._error("has died")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _error(self, reason: str) -> ChildError:
        return ChildError(f"{self.name}: {reason}\n--- end of {self.log_path}\n{self.log_tail()}")


@dataclass
class Burst:
    """The answers of one generate."""

    began: float
    wall_s: float
    answers: list[dict[str, Any]]

    @property
    def errors(self) -> list[str]:
        return [answer["error"] for answer in self.answers if answer["error"]]

    @property
    def ttfts_s(self) -> list[float]:
        return [answer["ttft_s"] for answer in self.answers if answer["ttft_s"] is not None]

    @property
    def tpots_s(self) -> list[float]:
        return [answer["tpot_s"] for answer in self.answers if answer["tpot_s"] is not None]

    @property
    def handed_over_s(self) -> float:
        """When the last request went to the engine, after the moment when it should have."""
        return float(max(answer["sent_s"] for answer in self.answers))

    @property
    def new_tokens(self) -> int:
        return sum(answer["tokens"] for answer in self.answers)

    @property
    def ids(self) -> list[list[int]]:
        return [answer["ids"] for answer in self.answers]


class Engine(Child):
    """An engine of any kind. Made by ``Card``; ready after ``wait``."""

    def __init__(
        self, kind: str, name: str, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(name, ENGINE, log_path, environment)
        self.kind = kind
        self.pids: list[int] = []
        self.flags: dict[str, str] = {}
        self.is_ready = False
        self._start: dict[str, Any] = {}

    def prepare(self, device_kind: str, start: dict[str, Any]) -> None:
        """Begin SGLang's imports; ``start`` is what ``begin`` will send."""
        self._start = start
        self.send("prepare", kind=self.kind, device_kind=device_kind)

    def begin(self) -> None:
        say(f"{self.name}: starting ({self.kind})")
        self.send("start", kind=self.kind, **self._start)

    def wait(self, timeout_s: float = 240.0) -> None:
        self.receive(timeout_s)  # the imports
        started = self.receive(timeout_s)
        self.pids = started["pids"]
        self.flags = started["flags"]
        self.is_ready = True
        say(f"{self.name}: ready, {started['start_s']:.1f} s after its imports")

    def send_burst(
        self, asks: Sequence[Ask], *, keep_ids: bool = False, one_by_one: bool = False, at: float = 0.0
    ) -> None:
        self.send(
            "generate", asks=[asdict(ask) for ask in asks], keep_ids=keep_ids, one_by_one=one_by_one, at=at
        )

    def receive_burst(self, timeout_s: float = 120.0) -> Burst:
        return Burst(**self.receive(timeout_s))

    def burst(self, asks: Sequence[Ask], timeout_s: float = 120.0, **how: Any) -> Burst:
        self.send_burst(asks, **how)
        return self.receive_burst(timeout_s)

    def greedy(self, asks: Sequence[Ask]) -> list[list[int]]:
        """Greedy tokens, with nothing cached and one by one: in other batches random weights answer otherwise.

        Raises:
            ChildError: a request failed.
        """
        self.act({"name": "flush_cache"})
        burst = self.burst(asks, keep_ids=True, one_by_one=True)
        if burst.errors:
            raise ChildError(f"{self.name}: {burst.errors[0]}")
        return burst.ids

    def gaps(self, asks: Sequence[Ask], answers: Sequence[Sequence[int]]) -> list[list[float]]:
        """For each token of each answer, by how much this engine finds another one likelier: see ``do_gaps``.

        Unlike equality it does not depend on which batches the answers were computed in.
        """
        self.act({"name": "flush_cache"})
        result: list[list[float]] = self.call(
            "gaps", asks=[asdict(ask) for ask in asks], answers=[list(answer) for answer in answers]
        )
        return result

    def act(self, action: Action, times: int = 1, timeout_s: float = 120.0) -> list[float]:
        result: list[float] = self.call("act", timeout_s, action=action, times=times)
        return result

    def act_then_generate(self, action: Action, ask: Ask, timeout_s: float = 120.0) -> dict[str, Any]:
        result: dict[str, Any] = self.call("act_then_generate", timeout_s, action=action, ask=asdict(ask))
        return result

    def act_amid(self, action: Action, asks: Sequence[Ask], timeout_s: float = 120.0) -> Burst:
        """The action as soon as all of these requests decode."""
        return Burst(**self.call("act_amid", timeout_s, action=action, asks=[asdict(ask) for ask in asks]))

    def log_mark(self) -> int:
        return self.log_path.stat().st_size

    def log_matches(self, pattern: str, since: int = 0, wait_s: float = 0.3) -> list[tuple[str, ...]]:
        """Groups of every match in what was logged after ``since``; waits a little for the first."""
        deadline = time.monotonic() + wait_s
        while True:
            with self.log_path.open("rb") as log:
                log.seek(since)
                text = log.read().decode(errors="replace")
            found = [match.groups() for match in re.finditer(pattern, text)]
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.02)


def wait_all(engines: Sequence[Engine], timeout_s: float = 240.0) -> None:
    """All ready, or ChildError of the first that is not."""
    deadline = time.monotonic() + timeout_s
    for engine in engines:
        engine.wait(max(1.0, deadline - time.monotonic()))


def different_flags(one: Engine, other: Engine) -> dict[str, tuple[str | None, str | None]]:
    """SGLang's arguments in which two engines differ: to be shown, so that nobody compares apples with pears."""
    names = sorted(one.flags.keys() | other.flags.keys())
    return {
        name: (one.flags.get(name), other.flags.get(name))
        for name in names
        if one.flags.get(name) != other.flags.get(name) and name != "nccl_port"
    }
