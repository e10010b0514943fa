"""Local level: in which order the waiting requests of one device run.

Moore's algorithm (Moore 1968, with Hodgson's proof) finds the largest set of jobs that one machine ends in time:
take them by deadline; whenever one would be late, drop the longest taken so far. Prism section 6.2 uses it per
device with d = arrival + TTFT SLO and e = time to prefill. Three things are added here:

- *Hopeless first*: a request that is late even if it ran at once is put aside before the algorithm. It would
  push out feasible ones only to be dropped itself.
- *Priority*: levels are scheduled one after the other, the bigger first, so a request is never made late by one of
  smaller priority; inside a level the number in time is the largest possible. Among the late ones too the
  bigger priority goes first.
- *Ageing*: who has waited longer than a bound goes first, oldest first, whatever its priority. So a late one
  waits that long at most behind new ones, and overload turns into first come, first served.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Protocol, TypeVar


class Waiting(Protocol):
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def deadline(self) -> float: ...


R = TypeVar("R", bound=Waiting)


def order(
    requests: Iterable[R], now: float, estimate_s: Callable[[R], float], *, max_wait_s: float = 10.0
) -> list[R]:
    """All requests in the order to run: aged ones, those in time, late ones. O(n log n), and stable."""
    aged: list[R] = []
    hopeful: list[tuple[int, float, float, int, float, R]] = []
    late: list[R] = []
    for number, request in enumerate(requests):
        if now - request.arrival > max_wait_s:
            aged.append(request)
            continue
        needed_s = estimate_s(request)
        if now + needed_s > request.deadline:
            late.append(request)
        else:
            # The number keeps the sort from ever comparing requests.
            key = (-request.priority, request.deadline, request.arrival, number)
            hopeful.append((*key, needed_s, request))
    aged.sort(key=lambda request: request.arrival)
    at = now + sum(estimate_s(request) for request in aged)
    hopeful.sort()
    in_time: list[R] = []
    for _, level in groupby(hopeful, key=lambda entry: entry[0]):
        at = _moore(level, at, in_time, late)
    late.sort(key=lambda request: (-request.priority, request.arrival))
    return aged + in_time + late


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
