"""SGLang's scheduler and detokenizer processes, started before there is anything for them to do.

SGLang starts them when an engine starts, and each then pays the imports again. Ours are started with the waiting
worker, import at the same time as it does, and block until they are given the function that SGLang would have
started them with. They are the worker's children, as SGLang's would be: its scheduler signals its parent when it
fails, and dies with it.

What is read from the environment at import is the waiting worker's, not the model's ``env``: among SGLang's own
variables SGLANG_ENABLE_TORCH_COMPILE, the DeepGEMM family (SGLANG_JIT_DEEPGEMM_PRECOMPILE, DG_JIT_CACHE_DIR),
SGLANG_DETOKENIZER_MAX_STATES, SGLANG_REQUEST_STATE_WAIT_TIMEOUT and SGLANG_FORCE_STREAM_INTERVAL. They count
where prism_sgl itself is started; what SGLang reads later (most ``envs.X.get()``, NCCL's and torch's allocator's)
may differ by model. The same holds for forked workers.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from setproctitle import setproctitle

from prism_sgl.engine.processes import die_with_parent, log_to
from prism_sgl.engine.spec import current_spec
from prism_sgl.errors import PrismError


class EarlyChildError(PrismError):
    """A process ended, or failed to import, before it was given its function."""


@dataclass(frozen=True)
class _Call:
    function: Callable[..., None]
    arguments: Mapping[str, Any]
    reports_as: str | None  # name of the parameter that takes the child's end of the pipe
    environment: dict[str, str]


class EarlyChild:
    """One process. Must be made in the main thread: the process dies with the thread that started it."""

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_serve_one_call, args=(name, os.getpid(), prepare, theirs), name=name
        )
        self.process.start()
        theirs.close()  # so that we see the end of the pipe when the child ends

    def wait_ready(self) -> float:
        """Seconds of its imports.

        Raises:
            EarlyChildError: with the child's own words.
        """
        try:
            answer: float | str = self.connection.recv()
        except EOFError:
            self.process.join()
            answer = f"ended with exit code {self.process.exitcode}"
        if isinstance(answer, str):
            raise EarlyChildError(f"{self.process.name}: {answer}")
        return answer

    def call(
        self, function: Callable[..., None], arguments: Mapping[str, Any], *, reports_as: str | None = None
    ) -> None:
        """Let the child run ``function`` for the rest of its life, with our environment and our runtime's log file.

        What it sends into the parameter ``reports_as`` arrives at ``connection``.
        """
        self.connection.send(_Call(function, arguments, reports_as, dict(os.environ)))


class EarlyChildren:
    """The two processes that one engine needs."""

    def __init__(self, prepare: Callable[[], None] | None = None) -> None:
        """``prepare`` in the place of ``prepare_scheduler``: for who needs more in the scheduler process."""
        self.scheduler = EarlyChild("scheduler", prepare or prepare_scheduler)
        self.detokenizer = EarlyChild("detokenizer", prepare_detokenizer)

    def wait_ready(self) -> dict[str, float]:
        """Seconds of each one's imports, by name."""
        return {child.process.name: child.wait_ready() for child in (self.scheduler, self.detokenizer)}

    def sentinels(self) -> list[int]:
        """Descriptors that become readable when a process ends."""
        return [self.scheduler.process.sentinel, self.detokenizer.process.sentinel]


def prepare_scheduler() -> None:
    import sglang.srt.managers.scheduler
    import sglang.srt.models.registry  # noqa: F401  (all model classes: 6 s)
    from sglang.srt.plugins import load_plugins

    from prism_sgl.engine.seams import prove_hooks

    load_plugins()
    prove_hooks()


def prepare_detokenizer() -> None:
    import sglang.srt.managers.detokenizer_manager  # noqa: F401


def _serve_one_call(name: str, parent: int, prepare: Callable[[], None], connection: Connection) -> None:
    die_with_parent(parent)
    # Now, not only for who looks at ps: once the environment has changed, no title can be set any more, not SGLang's.
    setproctitle(f"prism_sgl::{name}")
    began = time.monotonic()
    try:
        prepare()
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        raise
    connection.send(time.monotonic() - began)
    try:
        call: _Call = connection.recv()
    except EOFError:  # nobody wanted us
        return
    os.environ.update(call.environment)
    log_to(current_spec().log_path)
    arguments = dict(call.arguments)
    if call.reports_as is not None:
        arguments[call.reports_as] = connection
    call.function(**arguments)
