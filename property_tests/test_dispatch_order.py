"""The order of dispatch against all orders there are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from prism_sgl.schedulers.dispatch import order

NOW = 100.0
MAX_WAIT_S = 10.0


@dataclass(frozen=True)
class Job:
    number: int
    needs_s: int
    arrival: float
    deadline: float
    priority: int = 0


def jobs(priorities: tuple[int, ...], oldest_s: int, most: int = 7) -> st.SearchStrategy[list[Job]]:
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


@settings(derandomize=True, database=None, max_examples=200)
@given(waiting=jobs((0, 1), oldest_s=30, most=20))
def test_aged_ones_go_first_and_oldest_first(waiting: list[Job]) -> None:
    ordered = run(waiting)
    assert sorted(job.number for job in ordered) == [job.number for job in waiting]
    aged = [job for job in ordered if NOW - job.arrival > MAX_WAIT_S]
    assert ordered[: len(aged)] == aged
    assert [job.arrival for job in aged] == sorted(job.arrival for job in aged)


@settings(derandomize=True, database=None, max_examples=50)
@given(
    hopeless=st.integers(1, 5),
    urgent_needs_s=st.integers(1, 3),
    priority=st.integers(0, 3),
)
def test_nothing_starves_under_a_stream_of_urgent_requests(
    hopeless: int, urgent_needs_s: int, priority: int
) -> None:
    """One runs at a time; always a new one that is in time and of bigger priority is there."""
    waiting = [Job(i, 2, 0.0, 1.0) for i in range(hopeless)]
    now, number, served_at = 0.0, hopeless, {}
    while any(job.number < hopeless for job in waiting):
        waiting.append(Job(number, urgent_needs_s, now, now + 10, priority))
        number += 1
        first = order(waiting, now, lambda job: job.needs_s, max_wait_s=MAX_WAIT_S)[0]
        waiting.remove(first)
        now += first.needs_s
        served_at[first.number] = now
        assert now < 100, "starved"
    assert max(served_at[i] for i in range(hopeless)) <= MAX_WAIT_S + 3 + 2 * (hopeless + 1) * 3
