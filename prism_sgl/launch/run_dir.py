"""The private folder of one instance, and what a killed instance left behind.

Whoever holds the lock on ``<run_dir>/lock`` is the instance. A folder whose lock is free was left by one that
was killed: its processes are ended and its files removed before the new instance begins. Only a folder that was
empty becomes ours, and the mark in its lock says so ever after: what has no mark may be somebody's models.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from prism_sgl.errors import ConfigError, PortInUseError
from prism_sgl.launch.processes import end_sessions, read_stat

SHM_FOLDER = Path("/dev/shm")
_MARK = b"prism_sgl sweeps this folder at its start and removes it at its end\n"
_NUM_SHOWN = 3  # names of what is in the way


class RunDir:
    """Held for the supervisor's life; ``remove()`` takes away all that the instance made."""

    def __init__(self, path: str, port: int, report: Callable[[str], None] = print) -> None:
        self.path = Path(path)
        self.port = port
        self._report = report
        self.swept: list[str] = []  # what a killed instance had left, for the log
        self._sessions: dict[int, str] = {}  # pid of the leader -> its name
        self._is_written = True
        self._lock_fd = -1
        self._folder_fd = -1

    def acquire(self) -> None:
        """Make it ours. Raises if another instance lives in it, others may enter it, or it holds what is not ours."""
        while True:
            self._make()
            try:
                self._lock_fd = self._open_lock()
            except FileNotFoundError:
                continue  # the former owner has removed the folder
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock_fd)
                self._lock_fd = -1
                raise PortInUseError(
                    f"server.run_dir {self.path} is in use by another instance; "
                    "stop that one or give another folder"
                ) from None
            # The former owner may have removed the file between our open and our lock.
            try:
                if os.path.samestat(os.fstat(self._lock_fd), os.stat(self.path / "lock")):
                    break
            except FileNotFoundError:
                pass
            os.close(self._lock_fd)
        if os.pread(self._lock_fd, len(_MARK) + 1, 0) != _MARK:
            self._mark()
        # Below /tmp, systemd-tmpfiles removes what is old, but nothing in a folder that is locked (tmpfiles.d(5)).
        self._folder_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(self._folder_fd, fcntl.LOCK_SH)
        self._sweep()
        for folder in ("tmp", "logs"):
            (self.path / folder).mkdir(mode=0o700)

    def ledger_path(self, device: str) -> str:
        return str(SHM_FOLDER / f"{self._ledger_prefix()}{device}.ledger")

    def record(self, pid: int, name: str) -> None:
        """Remember the leader of a session, so that the next instance could end it if we are killed."""
        self._sessions[pid] = name
        self._write_sessions()

    def forget(self, pid: int) -> None:
        if self._sessions.pop(pid, None) is not None:
            self._write_sessions()

    def end_all(self) -> None:
        """SIGKILL whatever still lives of the recorded sessions. Blocks until it is gone."""
        end_sessions(self._sessions)
        self._sessions.clear()

    def remove(self) -> None:
        """The ledgers and the folder. The lock goes last: until then nobody else begins here."""
        self._remove_ledgers()
        if self._is_still_there():
            for listing in self.path.glob("*.shm"):
                remove_listed(listing)
            self._remove_files()
            (self.path / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # without the lock it may be the next instance's already
                self.path.rmdir()
        os.close(self._folder_fd)
        os.close(self._lock_fd)
        self._folder_fd = self._lock_fd = -1

    def _is_still_there(self) -> bool:
        """Not if somebody has removed the folder while we served; what is there now may be another instance's."""
        try:
            return os.path.samestat(os.fstat(self._folder_fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.lstat()
        except OSError as error:
            raise ConfigError(
                "server.run_dir", f"{self.path} cannot be made ({error.strerror})", "give another folder"
            ) from None
        # Somebody else who may write here could put sockets of their own in place of ours.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                "server.run_dir",
                f"{self.path} is not a folder of this user alone (mode 0700)",
                "remove it or give another one",
            )

    def _open_lock(self) -> int:
        # One look at all names: an instance that begins or ends meanwhile has its lock before and after all else.
        names = os.listdir(self.path)
        if names and "lock" not in names:
            raise self._not_ours(names)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self.path / "lock", flags, 0o600)
        except FileNotFoundError:
            raise
        except OSError:
            raise self._not_ours(names) from None

    def _mark(self) -> None:
        names = os.listdir(self.path)
        if names != ["lock"] or os.fstat(self._lock_fd).st_size > 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise self._not_ours(names)
        os.pwrite(self._lock_fd, _MARK, 0)

    def _not_ours(self, names: list[str]) -> ConfigError:
        shown = ", ".join(sorted(names)[:_NUM_SHOWN])
        if len(names) > _NUM_SHOWN:
            shown += f" and {len(names) - _NUM_SHOWN} more"
        return ConfigError(
            "server.run_dir",
            f"{self.path} holds {shown}, but no lock that prism_sgl has written",
            "give an empty or new folder: all that is in it is removed",
        )

    def _sweep(self) -> None:
        for pid in _left_sessions(self.path / "pids"):
            self.swept += [f"process {killed}" for killed in end_sessions([pid])]
        for listing in self.path.glob("*.shm"):
            self.swept += remove_listed(listing)
        self.swept += self._remove_ledgers()
        self.swept += self._remove_files()

    def _remove_ledgers(self) -> list[str]:
        # The port is bound by us, so no living instance has ledgers of this name.
        removed = []
        for path in SHM_FOLDER.glob(f"{self._ledger_prefix()}*.ledger"):
            if path.lstat().st_uid == os.getuid():
                path.unlink(missing_ok=True)
                removed.append(str(path))
        return removed

    def _remove_files(self) -> list[str]:
        removed = []
        for entry in self.path.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
            removed.append(str(entry))
        return removed

    def _ledger_prefix(self) -> str:
        return f"prism_sgl-{os.getuid()}-{self.port}-"

    def _write_sessions(self) -> None:
        lines = []
        for pid, name in self._sessions.items():
            if found := read_stat(pid):
                lines.append(f"{pid} {found.start_ticks} {name}\n")
        fresh = self.path / "pids.new"
        try:
            fresh.write_text("".join(lines))
            fresh.replace(self.path / "pids")
        except OSError as error:  # a full disk is no reason to end engines that are well
            if self._is_written:
                self._report(
                    f"warning: {fresh} cannot be written ({error.strerror}); make room there: until it can, "
                    "what outlives us if we are killed is not ended by the next instance"
                )
            self._is_written = False
        else:
            self._is_written = True


def remove_listed(listing: Path) -> list[str]:
    """Remove the files in /dev/shm that a worker has listed, one path a line: a killed one cannot itself."""
    removed = []
    with contextlib.suppress(FileNotFoundError):
        for line in listing.read_text().splitlines():
            path = Path(line)
            if path.parent == SHM_FOLDER and path.exists() and path.lstat().st_uid == os.getuid():
                path.unlink(missing_ok=True)
                removed.append(line)
        listing.unlink(missing_ok=True)
    return removed


def _left_sessions(pids: Path) -> list[int]:
    """Sessions of a killed instance that may still live: the leader is the one recorded, or has gone.

    While a session has members the kernel gives its number to no new process, so a living leader that
    began at another time means that the old session is over.
    """
    try:
        lines = pids.read_text().splitlines()
    except FileNotFoundError:
        return []
    left = []
    for line in lines:
        fields = line.split(" ", 2)
        if len(fields) == 3 and fields[0].isdigit() and fields[1].isdigit():
            found = read_stat(int(fields[0]))
            if found is None or found.start_ticks == int(fields[1]):
                left.append(int(fields[0]))
    return left
