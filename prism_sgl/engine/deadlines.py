"""The router's order in the engine's own queue: deadlines travel with their requests into SGLang's scheduler process.

The way of a deadline: ``Forward.due`` -> a context variable of the task that runs SGLang's app (``promised``) ->
``attach``, a hook where TokenizerManager makes the message to its scheduler -> ``sampling_params.custom_params`` of
that message -> ``Req.sampling_params`` -> ``calc_priority``, which takes it out again and orders the waiting queue.

Why there: the message is made in one place for every route (generate, chat, completions, responses, embeddings, all
prompts of a batch, all samples of n > 1), and ``custom_params`` is the one field of all its kinds that reaches Req
unchanged (also through sessions) and is free. ``custom_labels`` ends in the tokenizer's metrics; ``routing_key`` is
lost for embeddings, and comes by header on some routes and by body on others; ``time_stats`` has a fixed set of
fields; ``priority`` is the user's. A side channel by rid would need the same hook, and could lose or delay a word.

Light on purpose: bridge.py and tests/fake_engine.py import this without SGLang.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from typing import Any

from prism_sgl.deadline_order import AGED_EVERY, aged_at, order
from prism_sgl.messages import Due

# As [scheduler] max_wait has it by default: the router has held the request already, this bounds what comes after.
MAX_WAIT_S = 10.0
_KEY = "prism_due"
_UNKNOWN_S = (
    0.02  # prefill of a request that nobody has told of: it has no deadline, so it delays none by much
)


@dataclass(frozen=True, slots=True)
class Promise:
    """A Due with absolute times, of this host's monotonic clock: worker and scheduler are on one host."""

    deadline: float
    arrival: float
    priority: int
    needed_s: float


_promise: ContextVar[Promise | None] = ContextVar("prism_promise", default=None)


def promised() -> Promise | None:
    """Of the request that the running task is about."""
    return _promise.get()


@contextlib.contextmanager
def promise(due: Due | None) -> Iterator[None]:
    """Inside, and in all tasks that are begun inside, requests to the engine have this deadline."""
    now = time.monotonic()
    token = _promise.set(
        None if due is None else Promise(now + due.in_s, now - due.waited_s, due.priority, due.needed_s)
    )
    try:
        yield
    finally:
        _promise.reset(token)


def attach(result: Any, _manager: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER TokenizerManager._create_tokenized_object: the message to the scheduler carries the promise.

    What a client writes under our key counts for nothing: it is overwritten, or removed if there is no promise.
    """
    params = result.sampling_params
    theirs = params.custom_params if isinstance(params.custom_params, dict) else {}
    found = _promise.get()
    if found is not None:
        params.custom_params = {**theirs, _KEY: list(astuple(found))}
    elif _KEY in theirs:
        params.custom_params = {key: value for key, value in theirs.items() if key != _KEY}


def calc_priority(
    original: Callable[..., None], policy: Any, waiting_queue: list[Any], *args: Any, **kwargs: Any
) -> None:
    """AROUND SchedulePolicy.calc_priority, once each prefill pass: SGLang's order, then ours on top of it.

    With a ``schedule_policy`` other than fcfs, which only a user's engine_args can name, SGLang's order stays.
    """
    waiting = [_Waiting(request, _take_promise(request)) for request in waiting_queue]
    original(policy, waiting_queue, *args, **kwargs)
    if policy.policy.value != "fcfs":
        return
    turns: _Turns | None = getattr(policy, "prism_turns", None)
    if turns is None:
        turns = policy.prism_turns = _Turns()
    now = time.monotonic()
    turns.look(waiting)
    if any(entry.promise is not None for entry in waiting):
        places = {id(request): place for place, request in enumerate(waiting_queue)}
        waiting.sort(key=lambda entry: places[id(entry.request)])
        if policy.enable_priority_scheduling:
            for entry in waiting:
                entry.priority = -policy.priority_sign * (entry.request.priority or 0)
        waiting = in_order(waiting, now, turns.since_aged)
        waiting_queue[:] = [entry.request for entry in waiting]
    turns.remember(waiting, now)


class _Waiting:
    """A waiting Req as deadline_order.py wants to see it."""

    __slots__ = ("arrival", "deadline", "priority", "promise", "request")

    def __init__(self, request: Any, promise: Promise | None) -> None:
        # One that was retracted has its first token behind it: what was promised has been kept or not.
        self.promise = None if len(request.output_ids) else promise
        self.request = request
        if self.promise is not None:
            self.deadline, self.arrival = self.promise.deadline, self.promise.arrival
        else:
            # perf_counter and monotonic are one clock on Linux.
            self.deadline, self.arrival = math.inf, request.time_stats.wait_queue_entry_time
        self.priority = promise.priority if promise is not None else 0

    def needed_s(self) -> float:
        return self.promise.needed_s if self.promise is not None else _UNKNOWN_S


class _Turns:
    """Counts how many requests have left the queue since the last aged one did."""

    def __init__(self) -> None:
        self.since_aged = AGED_EVERY - 1
        self._last: list[tuple[str, bool]] = []  # rids in order; whether it was aged

    def look(self, waiting: list[_Waiting]) -> None:
        still = {entry.request.rid for entry in waiting}
        for rid, aged in self._last:
            if rid not in still:
                self.since_aged = 0 if aged else self.since_aged + 1

    def remember(self, waiting: list[_Waiting], now: float) -> None:
        self._last = [(entry.request.rid, aged_at(entry, MAX_WAIT_S) < now) for entry in waiting]


def in_order(waiting: list[_Waiting], now: float, since_aged: int) -> list[_Waiting]:
    """``waiting`` comes in SGLang's order, and those without a promise keep it among themselves: they take the places
    that the order has for any of them, aged ones too."""
    ordered = order(waiting, now, _Waiting.needed_s, max_wait_s=MAX_WAIT_S, since_aged=since_aged)
    unpromised = iter([entry for entry in waiting if entry.promise is None])
    return [next(unpromised) if entry.promise is None else entry for entry in ordered]


def _take_promise(request: Any) -> Promise | None:
    """Found once, then kept on the request: no other reader of its parameters shall see ours."""
    if not hasattr(request, "prism_promise"):
        params = request.sampling_params
        given = params.custom_params if isinstance(params.custom_params, dict) else {}
        found = given.pop(_KEY, None)
        # SGLang has put the request itself beside what a client gave (schedule_batch.py:876); alone, that is a cycle
        # for nothing.
        if found and request.custom_logit_processor is None and given.keys() <= {"__req__"}:
            params.custom_params = None
        request.prism_promise = Promise(*found) if found else None
    promise: Promise | None = request.prism_promise
    return promise
