"""Background tasks whose failure somebody learns of at once; asyncio tells only when the task is collected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

Fail = Callable[[BaseException], None]


def start_task(work: Coroutine[object, object, None], fail: Fail) -> asyncio.Task[None]:
    task = asyncio.create_task(work)

    def done(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and (error := ended.exception()) is not None:
            fail(error)

    task.add_done_callback(done)
    return task
