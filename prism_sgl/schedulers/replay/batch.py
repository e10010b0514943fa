"""What one engine decodes at the moment, and the pages that hold it: two structures, each with its own invariants."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prism_sgl.schedulers.replay.device import Device
from prism_sgl.schedulers.replay.spec import ModelCosts


@dataclass(slots=True, eq=False)
class Job:
    """One request inside an engine."""

    key: object
    prompt_tokens: int
    output_tokens: int
    on_first: Callable[[], None]
    on_end: Callable[[], None]
    written: int = 0
    cancelled: bool = False

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.written

    @property
    def left(self) -> int:
        return self.output_tokens - self.written


class Batch:
    """Owner of the running requests.

    All of them get one token a step, so a request is known by the step at which it ends, and steps of a batch that
    does not change are one addition. ``written`` of a job is brought up to date when it leaves.

    Invariants: ``size`` and ``left_tokens`` are those of the heap; ``live_tokens`` is the context of all running.
    """

    def __init__(self) -> None:
        self._by_end: list[tuple[int, int, Job]] = []  # (step at which it ends, number, job)
        self._number = 0
        self._step = 0
        self._ends_sum = 0
        self.size = 0
        self.live_tokens = 0

    @property
    def left_tokens(self) -> int:
        """What all of them may still write."""
        return self._ends_sum - self._step * self.size

    @property
    def steps_to_end(self) -> int:
        """Until the first of them ends."""
        return self._by_end[0][0] - self._step

    def join(self, job: Job) -> None:
        self._number += 1
        end = self._step + job.left
        heapq.heappush(self._by_end, (end, self._number, job))
        self._ends_sum += end
        self.size += 1
        self.live_tokens += job.context_tokens

    def advance(self, steps: int) -> list[Job]:
        """The jobs that end with these steps, in the order of their ends."""
        self._step += steps
        self.live_tokens += steps * self.size
        ended: list[Job] = []
        while self._by_end and self._by_end[0][0] <= self._step:
            end, _, job = heapq.heappop(self._by_end)
            self._leave(job, end)
            ended.append(job)
        return ended

    def remove(self, job: Job) -> None:
        """Nothing happens if it is not running."""
        for index, (_, _, running) in enumerate(self._by_end):
            if running is job:
                self._pop(index)
                return

    def retract(self) -> Job:
        """The one with the fewest written tokens, the youngest of them."""
        return self._pop(
            min(
                range(len(self._by_end)),
                key=lambda i: (self._by_end[i][2].output_tokens - self._by_end[i][0], -self._by_end[i][1]),
            )
        )

    def _pop(self, index: int) -> Job:
        end, _, job = self._by_end.pop(index)
        heapq.heapify(self._by_end)
        self._leave(job, end)
        return job

    def _leave(self, job: Job, end: int) -> None:
        job.written = job.output_tokens - (end - self._step)
        self.size -= 1
        self._ends_sum -= end
        self.live_tokens -= job.context_tokens

    def check(self) -> None:
        assert self.size == len(self._by_end)
        assert self._ends_sum == sum(end for end, _, _ in self._by_end)
        live = (job.output_tokens - (end - self._step) + job.prompt_tokens for end, _, job in self._by_end)
        assert self.live_tokens == sum(live)


class Pages:
    """Owner of one engine's KV pages, the same number on each of its devices.

    Invariant: never fewer than ``least`` while open. With a cap they are a share of its own, held from the begin
    (static split); else they come one by one, and those that emptied are anybody's at once: in the real engine they
    stay mapped until a neighbour asks, which takes milliseconds.
    """

    def __init__(
        self, owner: object, costs: ModelCosts, devices: Sequence[Device], kv_cap_bytes: int = 0
    ) -> None:
        self._owner, self._costs, self._devices = owner, costs, tuple(devices)
        self._fixed = kv_cap_bytes // costs.page_bytes
        self.least = max(-(-costs.floor_bytes // costs.page_bytes), self._fixed)
        self.held = 0

    @property
    def held_tokens(self) -> int:
        return self.held * self._costs.page_tokens

    @property
    def room_tokens(self) -> int:
        """Tokens that it can hold without asking anybody for anything."""
        pages = self.held
        if not self._fixed:
            pages += min(device.free_bytes for device in self._devices) // self._costs.page_bytes
        return pages * self._costs.page_tokens

    def missing(self, tokens: int) -> int:
        return max(0, self._needed(tokens) - self.held)

    def try_add(self, num: int) -> bool:
        if self._fixed and num:
            return False
        size_bytes = num * self._costs.page_bytes
        for done, device in enumerate(self._devices):
            if not device.try_hold(self._owner, size_bytes):
                for other in self._devices[:done]:
                    other.release(self._owner, size_bytes)
                return False
        self.held += num
        return True

    def fit(self, tokens: int) -> None:
        """Give back what these tokens do not need."""
        spare = self.held - max(self.least, self._needed(tokens))
        if spare > 0:
            self.held -= spare
            for device in self._devices:
                device.release(self._owner, spare * self._costs.page_bytes)

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self._costs.page_tokens)
