"""A model of one SGLang engine: continuous batching, KV by the page, retraction.

As SGLang does it: prefill goes before decode and stops it; a pass takes as many waiting requests as fit in
``pass_tokens``, the running limit and memory (prompt, and a part of what all running ones may still write);
a decode step writes one token for each of the batch; when no page can be had for it, the request with the
fewest written tokens goes back to the queue and is prefilled again.

Steps of a batch that does not change are one event, so a request costs a handful of events whatever its length.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

from prism_sgl.schedulers.replay.batch import Batch, Job, Pages
from prism_sgl.schedulers.replay.device import Clock, Device
from prism_sgl.schedulers.replay.spec import ModelCosts

# The part of the tokens still to come that is kept free at admission: SGLang's new_token_ratio decays from 0.7
# to about 0.1 while nothing is retracted; the middle of it.
_GROWTH_RATIO = 0.3


class Doing(enum.Enum):
    NOTHING = "nothing"
    PREFILL = "prefill"
    DECODE = "decode"


class Engine:
    """Owner of the requests of one awake model on its devices.

    Invariants: the pages hold what is live (the batch, and the pass at hand), and never less than the floor. It
    holds the same bytes on each of its devices (tp parts are equal).
    """

    def __init__(
        self, name: str, costs: ModelCosts, devices: Sequence[Device], clock: Clock, *, kv_cap_bytes: int = 0
    ) -> None:
        self.name, self.costs, self.devices = name, costs, tuple(devices)
        self._clock = clock
        self._pages = Pages(self, costs, devices, kv_cap_bytes)
        self._batch = Batch()
        self.is_open = False
        self.waiting: deque[Job] = deque()
        self._prefilling: list[Job] = []
        self._prefilling_tokens = 0
        self._doing = Doing.NOTHING
        self._work_s = 0.0  # of what it does now, at full speed
        self._done_s = 0.0
        self._since = 0.0
        self._speed = 1.0
        self._burst = 0  # decode steps under way
        self._burst_step_s = 0.0
        self._version = 0
        self.num_retracted = 0

    # ------------------------------------------------------------ being awake

    @property
    def open_bytes(self) -> int:
        costs = self.costs
        return costs.weights_bytes + costs.overhead_bytes + self._pages.least * costs.page_bytes

    def open(self) -> None:
        """The caller has reserved ``open_bytes`` in its name on each device."""
        self._pages.held, self.is_open = self._pages.least, True

    @property
    def owner(self) -> object:
        """In whose name the devices hold its memory."""
        return self

    def shut(self) -> None:
        """Only when nothing is in flight. What it holds is the caller's to give back."""
        assert self.idle, f"{self.name} has requests"
        self.is_open, self._pages.held = False, 0

    def close(self, keep_bytes: int) -> None:
        """As ``shut``; it keeps so much of each device."""
        self.shut()
        for device in self.devices:
            device.release(self, device.held_by(self) - keep_bytes)

    def set_aside(self) -> list[Job]:
        """Take all requests out, to be submitted again: their prompts and what is written are prefilled anew then."""
        if self._doing is Doing.DECODE:
            self._count_done_steps()
        jobs = [*self._prefilling, *self.waiting]
        while self._batch.size:
            jobs.append(self._batch.retract())
        self.stop()
        return [job for job in jobs if not job.cancelled]

    def stop(self) -> None:
        """All requests are gone, and the KV that they held beyond the least."""
        self._stop()
        self.waiting.clear()
        self._prefilling, self._prefilling_tokens, self._batch = [], 0, Batch()
        self._pages.fit(0)

    def abort(self) -> None:
        """Its process is gone, and all that it held."""
        self.stop()
        self.close(0)

    @property
    def idle(self) -> bool:
        return not self._batch.size and not self.waiting and not self._prefilling

    @property
    def kv_bytes(self) -> int:
        return self._pages.held * self.costs.page_bytes

    @property
    def wanted_bytes(self) -> int:
        """KV that it would take now and does not get."""
        if not self.waiting or self._doing is Doing.PREFILL:
            return 0
        short = self._live_tokens + self.waiting[0].context_tokens - self._pages.room_tokens
        return max(0, short) * self.costs.kv_bytes_per_token

    @property
    def _live_tokens(self) -> int:
        return self._batch.live_tokens + self._prefilling_tokens

    # ------------------------------------------------------------ requests

    def submit(self, job: Job) -> None:
        assert self.is_open, f"{self.name} is not awake"
        first = not self.waiting
        self.waiting.append(job)
        if self._doing is Doing.NOTHING:
            self._next()
        elif first and self._doing is Doing.DECODE:
            self._cut_burst()

    def cancel(self, job: Job) -> None:
        """It leaves with the step at hand, which the others lose; from a pass, when that ends."""
        job.cancelled = True
        if job in self.waiting:
            self.waiting.remove(job)
            return
        if self._doing is Doing.DECODE:
            self._count_done_steps()
        self._batch.remove(job)
        self._pages.fit(self._live_tokens)
        self._next()

    # ------------------------------------------------------------ time

    def speed_changed(self) -> None:
        if self._doing is not Doing.NOTHING:
            self._account()
            self._schedule()

    def _account(self) -> None:
        now = self._clock.now
        self._done_s += (now - self._since) * self._speed
        self._since = now
        self._speed = min(device.share for device in self.devices)

    def _schedule(self) -> None:
        self._version += 1
        version = self._version

        def due() -> None:
            if version == self._version:
                self._ended()

        self._clock.after(max(0.0, (self._work_s - self._done_s) / self._speed), due)

    def _start(self, doing: Doing, work_s: float) -> None:
        was, self._doing = self._doing, doing
        if was is Doing.NOTHING:
            for device in self.devices:
                device.enter(self)
        self._work_s, self._done_s, self._since = work_s, 0.0, self._clock.now
        self._speed = min(device.share for device in self.devices)
        self._schedule()

    def _stop(self) -> None:
        if self._doing is not Doing.NOTHING:
            self._doing = Doing.NOTHING
            self._version += 1
            for device in self.devices:
                device.leave(self)

    def _ended(self) -> None:
        if self._doing is Doing.PREFILL:
            self._end_pass()
        else:
            self._count_steps(self._burst)
        self._pages.fit(self._live_tokens)
        self._next()

    def _next(self) -> None:
        """At a border between steps: a pass if somebody can be admitted, else decode."""
        if self._prefilling:
            return  # a pass is under way
        if not (self._begin_pass() or self._begin_burst()):
            self._stop()

    # ------------------------------------------------------------ prefill

    def _begin_pass(self) -> bool:
        if not self.waiting:
            return False
        costs, room = self.costs, self._pages.room_tokens
        growth = self._batch.left_tokens * _GROWTH_RATIO
        while self.waiting and self._batch.size + len(self._prefilling) < costs.max_running:
            job = self.waiting[0]
            context = job.context_tokens + 1  # the pass writes a token
            if self._prefilling and self._prefilling_tokens + context > costs.pass_tokens:
                break
            needed = self._live_tokens + context
            if self._batch.size or self._prefilling:  # alone it may use all that there is
                growth += job.left * _GROWTH_RATIO
                needed += int(growth)
            if needed > room:
                break
            self._prefilling_tokens += context
            self._prefilling.append(self.waiting.popleft())
        if not self._prefilling:
            return False
        pages = self._pages.missing(self._live_tokens)
        held = self._pages.try_add(pages)
        assert held, "there was room a moment ago"
        work_s = costs.pass_s + self._prefilling_tokens * costs.prefill_s_per_token
        self._start(Doing.PREFILL, work_s + pages * costs.map_s_per_page)
        return True

    def _end_pass(self) -> None:
        jobs, self._prefilling, self._prefilling_tokens = self._prefilling, [], 0
        answered: list[Job] = []
        ended: list[Job] = []
        for job in jobs:
            if job.cancelled:
                continue
            if not job.written:  # else it was retracted after its first token
                answered.append(job)
            job.written += 1
            if job.left > 0:
                self._batch.join(job)
            else:
                ended.append(job)
        _tell(answered, ended)

    # ------------------------------------------------------------ decode

    def _begin_burst(self) -> bool:
        """As many steps as the batch stays the same and its pages suffice."""
        batch = self._batch
        while batch.size:
            pages = self._pages.missing(batch.live_tokens + batch.size)
            if pages and not self._pages.try_add(pages):
                self.waiting.appendleft(batch.retract())
                self.num_retracted += 1
                assert batch.size, "one request of full length always fits the floor"
                continue
            room = self._pages.held_tokens - batch.live_tokens
            self._burst = min(batch.steps_to_end, room // batch.size)
            average = batch.live_tokens + self._burst * batch.size / 2
            self._burst_step_s = self.costs.decode_s(batch.size, average)
            self._start(Doing.DECODE, self._burst * self._burst_step_s)
            return True
        return False

    def _cut_burst(self) -> None:
        """Somebody waits: after the step at hand, not after all of them."""
        self._account()
        steps = int(self._done_s / self._burst_step_s) + 1
        if steps < self._burst:
            self._burst = steps
            self._work_s = steps * self._burst_step_s
            self._schedule()

    def _count_done_steps(self) -> None:
        """Of a burst that is cut short; the step at hand is lost."""
        self._account()
        self._count_steps(min(self._burst, int(self._done_s / self._burst_step_s)))

    def _count_steps(self, steps: int) -> None:
        self._burst = 0
        _tell([], self._batch.advance(steps))

    def check(self) -> None:
        self._batch.check()
        assert self._prefilling_tokens == sum(job.context_tokens + 1 for job in self._prefilling)
        if self.is_open:
            assert self._pages.held >= self._pages.least
            assert self._live_tokens <= self._pages.held_tokens


def _tell(answered: Sequence[Job], ended: Sequence[Job]) -> None:
    for job in answered:
        job.on_first()
    for job in ended:
        job.on_end()
