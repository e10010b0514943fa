"""Random clients, operators and faults against a whole live system: what nobody thought of testing.

    python -m tests.soak [--minutes 4] [--faults] [--seed 1] [--clients 5] [--memory0 1300MiB] [--memory1 760MiB]

Three names on SmolLM2 in float32, on two host devices in which not all can be awake. Clients ask for greedy tokens,
which are compared with those of the quiet system; stream, leave in the middle, lose patience, send prompts that are too
long; operators sleep, wake, move, load and unload at random. With ``--faults`` processes are killed and stopped
meanwhile: then answers may be lost with an error, but nothing may hang or be wrong. In the end all models must answer,
and the ledgers must say what the kernel says.

Not deterministic, since it runs against time, and so no part of ``make test``. Ends with 1 if there was a problem.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx

from prism_sgl.units import GRANULE_BYTES
from tests.engine.reference import MODEL_PATH
from tests.engine.system import System, running
from tests.soak_client import ANSWER_TOKENS, HANGS_S, MODELS, Client, Outcome, one_of

DEVICES = ("host0", "host1")
CONFIG = """
[server]
port = {port}
run_dir = "{run_dir}"
log_dir = "{log_dir}"
[scheduler]
sleep_after = "3s"
max_wait = "5s"
[[devices]]
name = "host0"
kind = "host"
memory = "{memory0}"
[[devices]]
name = "host1"
kind = "host"
memory = "{memory1}"
"""
MODEL_CONFIG = """
[models.NAME]
path = "{path}"
max_kv = "128MiB"
slo = {{ ttft_ms = 4000, tpot_ms = 500 }}
engine_args = {{ context_length = 1024, dtype = "float32", max_running_requests = 4 }}
"""
PROMPT_TOKENS = (1, 3, 7, 16, 40, 64, 65, 130, 200, 300)
VERBS = {"sleep": 6, "wake": 4, "move": 4, "load": 2, "unload": 1}
ENGINE_FAULTS = ("scheduler", "worker", "pause")
FAULTS = {"scheduler": 3, "worker": 3, "pause": 3, "router": 2, "api_server": 2, "standby": 2}


class Soak:
    """Owner of what has been seen so far."""

    def __init__(self, system: System, args: argparse.Namespace) -> None:
        self.system = system
        self.args = args
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.slowest: list[tuple[float, str]] = []
        self.answers: list[list[int]] = []
        self._lock = threading.Lock()
        rng = random.Random(0)
        self.prompts = [[rng.randrange(1000, 30000) for _ in range(tokens)] for tokens in PROMPT_TOKENS]
        self._began = time.monotonic()
        self._ends = self._began

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self._ends

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text[:400]}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text[:1000])
        self.say(f"PROBLEM {text}")

    def saw(self, what: str, seconds: float) -> None:
        with self._lock:
            self.counts[what] += 1
            self.slowest = sorted([*self.slowest, (round(seconds, 1), what)], reverse=True)[:8]

    def run(self) -> None:
        self.answers = [
            self.system.generate("chat", ids, ANSWER_TOKENS)["output_ids"] for ids in self.prompts
        ]
        self.say("the quiet system's answers are there")
        self._ends = time.monotonic() + self.args.minutes * 60
        jobs = [Client(self, number).work for number in range(self.args.clients)]
        jobs += [self._operate, *([self._break_things] if self.args.faults else [])]
        threads = [threading.Thread(target=self._guarded, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.say("quiet again")
        self._all_answer()
        time.sleep(5)  # what nobody needs is given back, and told
        self._books_are_true()
        for what, count in sorted(self.counts.items()):
            print(f"{count:6} {what}")
        print("slowest:", ", ".join(f"{seconds} s {what}" for seconds, what in self.slowest))

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # of this script: it must be seen too
            self.problem(f"{job}: {error!r}")

    # ------------------------------------------------------------ operators and faults

    def _operate(self) -> None:
        rng = random.Random(self.args.seed * 1000 + 500)
        with httpx.Client(base_url=self.system.url, timeout=HANGS_S) as client:
            while self.goes_on:
                time.sleep(rng.uniform(1, 6))
                verb, model = one_of(rng, VERBS), rng.choice([*MODELS])
                query = f"?device={rng.choice(DEVICES)}" if verb == "move" else ""
                began = time.monotonic()
                outcome: Outcome
                try:
                    reply = client.post(f"/api/v1/models/{model}/{verb}{query}")
                    outcome = reply.status_code
                    if outcome >= 500 and not self.args.faults:
                        self.problem(f"{verb} {model}: {outcome} {reply.text}")
                except httpx.HTTPError as error:
                    outcome = self.broken(f"{verb} {model}", error)
                self.saw(f"operator: {verb} {outcome}", time.monotonic() - began)

    def _break_things(self) -> None:
        rng = random.Random(self.args.seed * 1000 + 600)
        while self._ends - time.monotonic() > 30:
            time.sleep(rng.uniform(8, 20))
            fault, model = one_of(rng, FAULTS), rng.choice([*MODELS])
            if (pid := self._victim(fault, model)) is None:
                continue
            self.say(f"fault: {fault} of {model if fault in ENGINE_FAULTS else 'the system'}")
            try:
                if fault == "pause":
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(3)
                    os.kill(pid, signal.SIGCONT)
                else:
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            self.saw(f"fault: {fault}", 0.0)

    def _victim(self, fault: str, model: str) -> int | None:
        if fault in ENGINE_FAULTS:
            return self.system.runtime_pids(model).get("worker" if fault == "worker" else "scheduler")
        return self.system.running_module("engine.standby" if fault == "standby" else f"launch.{fault}")

    def broken(self, what: str, error: httpx.HTTPError) -> str:
        """No answer at all: with faults a connection may be cut, but nobody may wait for ever."""
        if not self.args.faults or isinstance(error, httpx.TimeoutException):
            self.problem(f"{what}: {error!r}")
        return type(error).__name__

    # ------------------------------------------------------------ in the end

    def _all_answer(self) -> None:
        for model in MODELS:
            for ids, answer in zip(self.prompts, self.answers, strict=True):
                try:
                    found = self.system.generate(model, ids, ANSWER_TOKENS)["output_ids"]
                except (AssertionError, httpx.HTTPError) as error:
                    self.problem(f"{model} does not answer in the end: {error}")
                    break
                if found != answer:
                    self.problem(f"{model} answers {found} in the end, not {answer}")

    def _books_are_true(self) -> None:
        arenas = self.system.arenas()
        for device in DEVICES:
            for owner in self.system.ledger(device).owners():
                for kind, granules in (("weights", owner.weights), ("kv", owner.kv)):
                    real = arenas.pop(f"{owner.name}:{kind}", 0)
                    if real != granules * GRANULE_BYTES:
                        self.problem(
                            f"{owner.name}, {kind}: ledger {granules * GRANULE_BYTES}, kernel {real}"
                        )
        if any(arenas.values()):
            self.problem(f"memory that no ledger knows: {arenas}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--faults", action="store_true", help="kill and stop processes meanwhile")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--memory0", default="1300MiB", help="of host0; weights are 514 MiB")
    parser.add_argument("--memory1", default="760MiB", help="of host1")
    parser.add_argument("--folder", type=Path, help="for its logs, which are kept; else a new one in /tmp")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    folder.mkdir(exist_ok=True)
    config = CONFIG + "".join(MODEL_CONFIG.replace("NAME", name) for name in MODELS)
    print(f"three engines start, a minute; logs: {folder}/logs", flush=True)
    with running(folder, config, path=MODEL_PATH, memory0=args.memory0, memory1=args.memory1) as system:
        soak = Soak(system, args)
        soak.run()
    print(f"{len(soak.problems)} problems", *soak.problems, sep="\n- ")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
