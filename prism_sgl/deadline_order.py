"""In which order waiting requests run: one rule for the router's queue of a device and for an engine's own queue.

Moore's algorithm (Moore 1968, with Hodgson's proof) finds the largest set of jobs that one machine ends in time:
take them by deadline; whenever one would be late, drop the longest taken so far. Prism section 6.2 uses it per
device with d = arrival + TTFT SLO and e = time to prefill. Three things are added here:

- *Hopeless first*: a request that is late even if it ran at once is put aside before the algorithm. It would
  push out feasible ones only to be dropped itself. It runs after all that can be in time.
- *Priority*: levels are scheduled one after the other, the bigger first, so a request is never made late by one of
  smaller priority; inside a level the number in time is the largest possible. Among the late ones too the
  bigger priority goes first.
- *Ageing*: a request is aged once it has waited ``max_wait_s`` and its own deadline is past (one without a deadline
  has none to wait for). Every ``AGED_EVERY``-th place belongs to the one that aged first, whatever its priority. So
  n aged ones before it, a request runs at most ``AGED_EVERY * (n + 1)`` requests after it has aged; and overload
  costs those that can be in time a quarter of the machine, where first come, first served would cost them all of it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Protocol, TypeVar

AGED_EVERY = 4


class Waiting(Protocol):
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def deadline(self) -> float: ...


R = TypeVar("R", bound=Waiting)


def aged_at(request: Waiting, max_wait_s: float) -> float:
    """From when on it has a right to its turn."""
    waited = request.arrival + max_wait_s
    return waited if request.deadline == math.inf else max(waited, request.deadline)


def order(
    requests: Iterable[R],
    now: float,
    estimate_s: Callable[[R], float],
    *,
    max_wait_s: float = 10.0,
    since_aged: int = AGED_EVERY - 1,
) -> list[R]:
    """All requests in the order to run: those in time, late ones, and in their turn aged ones. O(n log n), stable.

    ``since_aged``: how many have run since the last aged one. Who runs only the first before asking again counts it.
    """
    aged: list[tuple[float, int, R]] = []
    hopeful: list[tuple[int, float, float, int, float, R]] = []
    late: list[R] = []
    for number, request in enumerate(requests):
        # The number keeps the sorts from ever comparing requests.
        if (since := aged_at(request, max_wait_s)) < now:
            aged.append((since, number, request))
            continue
        needed_s = estimate_s(request)
        if now + needed_s > request.deadline:
            late.append(request)
        else:
            key = (-request.priority, request.deadline, request.arrival, number)
            hopeful.append((*key, needed_s, request))
    aged.sort()
    at = now + (estimate_s(aged[0][-1]) if aged and since_aged >= AGED_EVERY - 1 else 0.0)
    hopeful.sort()
    in_time: list[R] = []
    for _, level in groupby(hopeful, key=lambda entry: entry[0]):
        at = _moore(level, at, in_time, late)
    late.sort(key=lambda request: (-request.priority, request.arrival))
    return (
        _take_turns(in_time + late, [request for *_, request in aged], since_aged) if aged else in_time + late
    )


def _moore(
    level: Iterable[tuple[int, float, float, int, float, R]], at: float, in_time: list[R], late: list[R]
) -> float:
    """Append the requests of one priority, given by deadline, to their list; returns when the last one ends."""
    taken: list[R] = []
    longest: list[tuple[float, int]] = []
    dropped: set[int] = set()
    for _, deadline, _, _, needed_s, request in level:
        heapq.heappush(longest, (-needed_s, len(taken)))
        taken.append(request)
        at += needed_s
        if at > deadline:
            minus_s, index = heapq.heappop(longest)
            dropped.add(index)
            at += minus_s
    for index, request in enumerate(taken):
        (late if index in dropped else in_time).append(request)
    return at


def _take_turns(others: list[R], aged: list[R], since_aged: int) -> list[R]:
    """Between two aged ones ``AGED_EVERY - 1`` others; what is left of either kind follows."""
    merged: list[R] = []
    begin, places = 0, max(0, AGED_EVERY - 1 - since_aged)
    for request in aged:
        merged += others[begin : begin + places]
        merged.append(request)
        begin, places = begin + places, AGED_EVERY - 1
    return merged + others[begin:]
