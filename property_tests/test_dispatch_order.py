"""The order of dispatch against all orders there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.deadline_order import AGED_EVERY, aged_at, order

NOW = 100.0
MAX_WAIT_S = 10.0


@dataclass(frozen=True)
class Job:
    number: int
    needs_s: int
    arrival: float
    deadline: float
    priority: int = 0


def jobs(priorities: tuple[int, ...], oldest_s: int, most: int = 8) -> st.SearchStrategy[list[Job]]:
    job = st.builds(
        lambda needs, age, slack, priority: Job(0, needs, NOW - age, NOW + slack, priority),
        st.integers(1, 8),
        st.integers(0, oldest_s),
        st.integers(-3, 30),
        st.sampled_from(priorities),
    )
    numbered = st.lists(job, max_size=most)
    return numbered.map(
        lambda js: [Job(i, j.needs_s, j.arrival, j.deadline, j.priority) for i, j in enumerate(js)]
    )


def run(waiting: list[Job]) -> list[Job]:
    return order(waiting, NOW, lambda job: job.needs_s, max_wait_s=MAX_WAIT_S)


def in_time(ordered: list[Job]) -> list[Job]:
    at, good = NOW, []
    for job in ordered:
        at += job.needs_s
        if at <= job.deadline:
            good.append(job)
    return good


def feasible(subset: tuple[Job, ...]) -> bool:
    """By deadline is the best order for jobs that shall all be in time."""
    return len(in_time(sorted(subset, key=lambda job: job.deadline))) == len(subset)


def best(waiting: list[Job], beside: tuple[Job, ...] = ()) -> tuple[Job, ...]:
    """A largest set that can be in time."""
    for size in range(len(waiting), -1, -1):
        for subset in combinations(waiting, size):
            if feasible((*beside, *subset)):
                return subset
    return ()


@settings(derandomize=True, database=None, max_examples=400)
@given(waiting=jobs((0,), oldest_s=int(MAX_WAIT_S)))
def test_as_many_as_possible_are_in_time(waiting: list[Job]) -> None:
    assert len(in_time(run(waiting))) == len(best(waiting))


@settings(derandomize=True, database=None, max_examples=200)
@given(waiting=jobs((0, 1, 2), oldest_s=int(MAX_WAIT_S)))
def test_smaller_priority_never_makes_a_bigger_one_late(waiting: list[Job]) -> None:
    top = [job for job in waiting if job.priority == max(j.priority for j in waiting)]
    good = [job for job in in_time(run(waiting)) if job in top]
    assert len(good) == len(best(top))


def is_aged(job: Job, now: float = NOW) -> bool:
    return aged_at(job, MAX_WAIT_S) < now


@settings(derandomize=True, database=None, max_examples=200)
@given(waiting=jobs((0,), oldest_s=30))
def test_what_can_be_in_time_goes_before_all_that_cannot(waiting: list[Job]) -> None:
    ordered = [job for job in run(waiting) if not is_aged(job)]
    hopeless = [job for job in ordered if NOW + job.needs_s > job.deadline]
    planned = [job for job in in_time(ordered) if job not in hopeless]
    assert ordered[: len(planned)] == planned
    assert not set(hopeless) & set(ordered[: len(planned)])


@settings(derandomize=True, database=None, max_examples=200)
@given(waiting=jobs((0, 1), oldest_s=30, most=20), since_aged=st.integers(0, 5))
def test_every_fourth_place_is_for_aged_ones_and_who_aged_first_goes_first(
    waiting: list[Job], since_aged: int
) -> None:
    ordered = order(waiting, NOW, lambda job: job.needs_s, max_wait_s=MAX_WAIT_S, since_aged=since_aged)
    assert sorted(job.number for job in ordered) == [job.number for job in waiting]
    aged = [job for job in ordered if is_aged(job)]
    since = [aged_at(job, MAX_WAIT_S) for job in aged]
    assert since == sorted(since)
    num_others = len(ordered) - len(aged)
    for number, job in enumerate(aged):
        others_before = max(0, AGED_EVERY - 1 - since_aged) + number * (AGED_EVERY - 1)
        assert ordered.index(job) == number + min(others_before, num_others)


streams: st.SearchStrategy[Callable[[int], tuple[int, int, int]]] = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(-2, 12)), min_size=1, max_size=12
).map(lambda kinds: lambda number: kinds[number % len(kinds)])


@settings(derandomize=True, database=None, max_examples=100)
@given(
    victims=st.lists(st.sampled_from((-5.0, 1.0, 12.0, math.inf)), min_size=1, max_size=6),
    stream=streams,
    a_turn=st.integers(1, 4),
)
def test_nothing_starves_whatever_keeps_coming(
    victims: list[float], stream: Callable[[int], tuple[int, int, int]], a_turn: int
) -> None:
    """One runs at a time, and with each some new ones come, urgent and of bigger priority. The bound that
    deadline_order.py states: n aged ones before it, ``AGED_EVERY * (n + 1)`` runs after it has aged."""
    waiting = [Job(i, 2, 0.0, deadline, -1) for i, deadline in enumerate(victims)]
    now, number, since_aged = 0.0, len(victims), 0
    due: dict[int, int] = {}  # runs until which an aged one must have had its turn
    num_runs = 0
    while any(job.number < len(victims) for job in waiting):
        for _ in range(a_turn):
            needs, priority, slack = stream(number)
            waiting.append(Job(number, needs, now, now + slack, priority))
            number += 1
        aged = sorted((j for j in waiting if is_aged(j, now)), key=lambda j: aged_at(j, MAX_WAIT_S))
        for before, job in enumerate(aged):
            due.setdefault(job.number, num_runs + AGED_EVERY * (before + 1))
        ordered = order(waiting, now, lambda job: job.needs_s, max_wait_s=MAX_WAIT_S, since_aged=since_aged)
        first = ordered[0]
        since_aged = 0 if is_aged(first, now) else since_aged + 1
        waiting.remove(first)
        num_runs += 1
        now += first.needs_s
        assert num_runs <= due.get(first.number, num_runs)
        assert num_runs < 2000, "starved"
