"""One device of the model: its memory, and how its time is shared by the engines that compute on it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    @property
    def now(self) -> float: ...
    def after(self, seconds: float, action: Callable[[], None]) -> None: ...


class HeapClock:
    """Virtual time for worlds without a Controller. Equal times happen in the order they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + seconds, self._number, action))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = max(self.now, until)


class Computing(Protocol):
    def speed_changed(self) -> None: ...


class Device:
    """Owner of who holds what and who computes.

    Invariant: what is held never exceeds the budget. Memory that somebody has claimed (a wake that waits for it)
    is given to nobody else, as the ledger's reclaim targets have it. What sleepers keep is not held: anybody who grows
    takes it, of the one that slept first first.

    Engines that compute at the same time get equal shares of the device: processes on one card are time-sliced,
    and decoding is bound by memory bandwidth, of which there is one.
    """

    def __init__(self, name: str, budget_bytes: int, clock: Clock, copy_slowdown: float = 1.0) -> None:
        self.name, self.budget_bytes = name, budget_bytes
        self._clock = clock
        self._copy_slowdown = copy_slowdown
        self._held: dict[object, int] = {}
        self.held_bytes = 0
        self._kept: dict[object, int] = {}
        self._claims: dict[object, tuple[int, Callable[[int], None]]] = {}
        self._claimed_bytes = 0
        self._active: dict[Computing, None] = {}
        self._copies = 0
        self._busy_since = 0.0
        self._busy_s = 0.0

    # ------------------------------------------------------------ memory

    @property
    def free_bytes(self) -> int:
        """For those who want to grow: without what is claimed."""
        return max(0, self.budget_bytes - self.held_bytes - self._claimed_bytes)

    def try_hold(self, owner: object, size_bytes: int) -> bool:
        """So much more for this owner, or nothing."""
        if size_bytes > self.free_bytes:
            return False
        self._add(owner, size_bytes)
        return True

    def release(self, owner: object, size_bytes: int) -> None:
        self._add(owner, -size_bytes)
        self._serve_claims()

    def keep(self, owner: object, size_bytes: int) -> None:
        """Of what this owner has given back, so much stays as it is until somebody wants the room."""
        self._kept[owner] = min(size_bytes, self.budget_bytes - self.held_bytes - sum(self._kept.values()))

    def kept_by(self, owner: object) -> int:
        return self._kept.get(owner, 0)

    def lose_kept(self, owner: object) -> int:
        """It is kept no longer; how much was still there."""
        return self._kept.pop(owner, 0)

    def claim(self, owner: object, size_bytes: int, granted: Callable[[int], None]) -> None:
        """Hold it as soon as it is there; nobody else grows meanwhile. First come, first served.

        ``granted`` is told how much of it the owner had kept.
        """
        self._claims[owner] = (size_bytes, granted)
        self._claimed_bytes += size_bytes
        self._serve_claims()

    def drop_claim(self, owner: object) -> bool:
        """False if it has been granted already."""
        claim = self._claims.pop(owner, None)
        if claim is not None:
            self._claimed_bytes -= claim[0]
        return claim is not None

    def held_by(self, owner: object) -> int:
        return self._held.get(owner, 0)

    def _serve_claims(self) -> None:
        while self._claims:
            owner, (size_bytes, granted) = next(iter(self._claims.items()))
            if size_bytes > self.budget_bytes - self.held_bytes:
                return
            self.drop_claim(owner)
            kept_bytes = self.lose_kept(owner)
            self._add(owner, size_bytes)
            granted(kept_bytes)

    def _add(self, owner: object, size_bytes: int) -> None:
        left = self._held.get(owner, 0) + size_bytes
        assert left >= 0, "more given back than was held"
        self.held_bytes += size_bytes
        self._take_kept()
        if left:
            self._held[owner] = left
        else:
            self._held.pop(owner, None)

    def _take_kept(self) -> None:
        while self._kept and (over := self.held_bytes + sum(self._kept.values()) - self.budget_bytes) > 0:
            sleeper, kept_bytes = next(iter(self._kept.items()))
            if kept_bytes > over:
                self._kept[sleeper] = kept_bytes - over
            else:
                del self._kept[sleeper]

    def resize(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._take_kept()
        self.check()

    # ------------------------------------------------------------ time

    @property
    def share(self) -> float:
        """Of the device's speed, what each computing engine gets."""
        return (self._copy_slowdown if self._copies else 1.0) / max(1, len(self._active))

    @property
    def num_active(self) -> int:
        return len(self._active)

    def enter(self, engine: Computing) -> None:
        if not self._active:
            self._busy_since = self._clock.now
        self._active[engine] = None
        self._tell(engine)

    def leave(self, engine: Computing) -> None:
        del self._active[engine]
        if not self._active:
            self._busy_s += self._clock.now - self._busy_since
        self._tell(engine)

    def copying(self, change: int) -> None:
        self._copies += change
        self._tell(None)

    def busy_s(self) -> float:
        return self._busy_s + (self._clock.now - self._busy_since if self._active else 0.0)

    def _tell(self, but: Computing | None) -> None:
        for engine in list(self._active):
            if engine is not but:
                engine.speed_changed()

    def check(self) -> None:
        assert sum(self._held.values()) == self.held_bytes
        assert self.held_bytes >= 0, f"{self.name} holds less than nothing"
        kept_bytes = sum(self._kept.values())
        assert self.held_bytes + kept_bytes <= self.budget_bytes, f"{self.name} holds more than it has"
        assert self._claimed_bytes == sum(size for size, _ in self._claims.values())
