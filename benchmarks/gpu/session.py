"""One benchmark's run: what it says on the way, how long it may take, where its results go."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from benchmarks.gpu.installed import attention_backend
from benchmarks.gpu.nvml import card_info
from benchmarks.gpu.results import Results


class OutOfTimeError(BaseException):
    """The benchmark's time is over. Not an Exception: no single measurement may swallow it."""


_BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """The whole benchmark ends after so long, whatever hangs: children are killed on the way out."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s are over")

    before = signal.signal(signal.SIGALRM, over)
    other_timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTimeError as error:
        say(f"STOPPED: {error}; the rows so far are written")
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *other_timer)


def open_results(name: str) -> Results:
    info = card_info()
    say(f"{name} on {info.name}, driver {info.driver}, attention {attention_backend()}")
    return Results(name, card=info.name, driver=info.driver)
