"""The log files of all processes: where they lie, what of them stays, and that none grows without end.

Every writer appends through a descriptor that it was started with, so a file that is cut short goes on at its new end.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from prism_sgl.config import Config, log_dir
from prism_sgl.errors import ConfigError

KEPT_LOGS = 10  # of a model's runtimes that have ended
# By default logs lie in the run directory, which may be memory. A busy engine writes some 10 KB/s.
MAX_LOG_BYTES = 16 << 20
_LOOK_EVERY_S = 10.0


def make_log_dir(config: Config) -> None:
    """Raises ConfigError if nothing can be written there."""
    path = Path(log_dir(config))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        problem = f'is "{path}", which cannot be written to ({error.strerror})'
        remedy = "give a folder that this user may write to, or leave it out"
        raise ConfigError("server.log_dir", problem, remedy, file=config.file) from None


def begin_log(path: Path, living: Collection[Path]) -> None:
    """Nothing of an earlier launch shall be in it; of its model's other logs the newest ``KEPT_LOGS`` stay.

    ``living``: logs that runtimes write to.
    """
    of_model = glob.escape(path.name.rpartition("@")[0])
    with contextlib.suppress(OSError):  # somebody else tidies up there too, or may write there and we may not
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            os.replace(path, _older(path))
        ended = set(path.parent.glob(f"{of_model}@*.log*")).difference(living, map(_older, living))
        for old in sorted(ended, key=lambda log: log.stat().st_mtime_ns, reverse=True)[KEPT_LOGS:]:
            old.unlink(missing_ok=True)


async def keep_logs_short(living: Callable[[], Iterable[Path]]) -> None:
    """Until cancelled. ``living``: the logs that somebody writes to now."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        for path in list(living()):
            await asyncio.to_thread(shorten, path)


def shorten(path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
    """What is longer than ``max_bytes`` begins anew; what was in it is in ``<path>.old``.

    A line that is written just between the copy and the cut is lost. A copy that finds no room is left out.
    """
    older = _older(path)
    with contextlib.suppress(OSError):  # it ended, and somebody has tidied up
        if path.stat().st_size <= max_bytes:
            return
        try:
            older.touch(mode=0o600)
            shutil.copyfile(path, older)
        except OSError:
            with contextlib.suppress(OSError):
                older.unlink(missing_ok=True)
        os.truncate(path, 0)


def _older(path: Path) -> Path:
    return Path(f"{path}.old")
