"""Waiting workers as the supervisor sees them: a real standby, real processes, nothing to import."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from prism_sgl.engine.standby import one_card
from prism_sgl.errors import ConfigError
from prism_sgl.messages import (
    Kill,
    RuntimeId,
    RuntimeSpec,
    Spawn,
    Spawned,
    StandbyReady,
    StandbyToSupervisor,
    WorkerExited,
    decode_standby_to_supervisor,
    encode_json,
)
from tests.engine.specs import runtime_spec
from tests.launch.instance import wait_for_end

CHAT, CODE = RuntimeId("chat@cuda0.1"), RuntimeId("code@cuda0.2")
TIMEOUT_S = 30


@dataclass
class Waiter:
    """The test's end of one tiny waiting worker."""

    pid: int
    control: socket.socket

    def say(self, command: str) -> None:
        self.control.send(command.encode())

    def took(self) -> tuple[str, int]:
        """The runtime that it has become, and the pid of its child. Blocks until it has a spec."""
        runtime, child = self.control.recv(1000).decode().split()
        return runtime, int(child)


class Room:
    """A standby process with tiny waiting workers, and this test as its supervisor."""

    def __init__(self, folder: Path, first: int, cores: int, expected: int | None = None) -> None:
        self.folder = folder
        self.log = folder / "standby.log"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(folder / "control"))
        self._listener.listen()
        self._listener.settimeout(TIMEOUT_S)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(TIMEOUT_S)
        with theirs, self.log.open("wb") as log:
            module = "tests.engine.programs.tiny_room"
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, (theirs.fileno(), first, expected or first, cores))],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "TINY_CONTROL": str(folder / "control")},
            )

    def waiter(self) -> Waiter:
        """The next that starts."""
        control, _ = self._listener.accept()
        control.settimeout(TIMEOUT_S)
        return Waiter(int(control.recv(100)), control)

    def ready_waiter(self) -> Waiter:
        waiter = self.waiter()
        waiter.say("imported")
        assert self.told() == StandbyReady(seconds=0.5)
        return waiter

    def spawn(self, runtime: RuntimeId, log_path: Path | None = None, **env: str) -> RuntimeSpec:
        spec = runtime_spec(
            runtime=runtime,
            model=runtime.split("@")[0],
            device="cuda0",
            device_kind="cuda",
            run_dir=str(self.folder),
            env=env,
            log_path=str(log_path or self.folder / f"{runtime}.log"),
        )
        self.channel.send(encode_json(Spawn(spec=spec)))
        return spec

    def kill(self, runtime: RuntimeId, grace_s: float = 60) -> None:
        self.channel.send(encode_json(Kill(runtime=runtime, grace_s=grace_s)))

    def told(self) -> StandbyToSupervisor:
        return decode_standby_to_supervisor(self.channel.recv(1 << 20))

    def children(self) -> set[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return set(map(int, text.split()))

    def close(self) -> int:
        self.channel.close()
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="prism-"))  # short: sockets live below it
    yield path
    shutil.rmtree(path)


@pytest.fixture
def room(folder: Path) -> Iterator[Room]:
    """One worker waits; two may import at the same time."""
    room = Room(folder, first=1, cores=6)
    yield room
    assert room.close() == 0, room.log.read_text()


def test_spec_goes_to_a_ready_worker_and_another_starts(room: Room) -> None:
    first = room.ready_waiter()
    room.spawn(CHAT)
    assert room.told() == Spawned(runtime=CHAT, pid=first.pid)
    assert first.took()[0] == CHAT
    second = room.waiter()
    second.say("imported")
    room.spawn(CODE)
    assert room.told() == Spawned(runtime=CODE, pid=second.pid)


def test_worker_logs_to_its_own_file_once_it_has_a_spec(room: Room) -> None:
    waiter = room.ready_waiter()
    spec = room.spawn(CHAT)
    waiter.took()
    assert os.path.samefile(f"/proc/{waiter.pid}/fd/2", spec.log_path)
    assert os.getsid(waiter.pid) == waiter.pid
    room.told()


def test_only_as_many_import_at_once_as_have_cores(folder: Path) -> None:
    room = Room(folder, first=3, cores=6)
    first, second = room.waiter(), room.waiter()
    assert room.children() == {first.pid, second.pid}
    first.say("imported")
    third = room.waiter()
    assert room.children() == {first.pid, second.pid, third.pid}
    room.close()


def test_as_many_as_may_start_at_once_wait_at_first_and_then_one(folder: Path) -> None:
    room = Room(folder, first=2, cores=6)
    for waiter in (room.waiter(), room.waiter()):
        waiter.say("imported")
    assert isinstance(room.told(), StandbyReady)
    room.spawn(CHAT)
    room.spawn(CODE)
    workers = {message.pid for message in (room.told(), room.told()) if isinstance(message, Spawned)}
    assert len(workers) == 2
    third = room.waiter()
    third.say("imported")
    room.kill(CHAT)
    assert isinstance(room.told(), WorkerExited)  # by then it would have started a fourth
    assert room.children() - workers == {third.pid}, room.log.read_text()
    room.close()


def test_who_is_next_imports_while_the_first_load(folder: Path) -> None:
    """Two may start at once, four models of models.toml will: two wait until the last but one is taken."""
    room = Room(folder, first=2, expected=4, cores=6)
    started = [room.waiter(), room.waiter()]  # all of them: one whose socket is closed ends
    for waiter in started:
        waiter.say("imported")
    assert isinstance(room.told(), StandbyReady)
    workers: set[int] = set()
    for number, left in enumerate((2, 2, 1, 1)):
        room.spawn(RuntimeId(f"m{number}@cuda0.1"))
        taken = room.told()
        assert isinstance(taken, Spawned)
        workers.add(taken.pid)
        while len(started) < len(workers) + left:
            started.append(room.waiter())
            started[-1].say("imported")
    waiting = {waiter.pid for waiter in started} - workers
    assert len(waiting) == 1
    room.kill(RuntimeId("m0@cuda0.1"))
    assert isinstance(room.told(), WorkerExited)  # by then it would have started another
    assert room.children() - workers == waiting, room.log.read_text()
    room.close()


def test_spec_that_comes_early_is_taken_by_the_first_that_is_ready(folder: Path) -> None:
    room = Room(folder, first=2, cores=6)
    _slow, quick = room.waiter(), room.waiter()
    room.spawn(CHAT)
    quick.say("imported")
    assert room.told() == StandbyReady(seconds=0.5)
    assert room.told() == Spawned(runtime=CHAT, pid=quick.pid)
    room.close()


def test_more_specs_than_waiting_workers_start_as_many_as_needed(folder: Path) -> None:
    room = Room(folder, first=1, cores=6)
    room.spawn(CHAT)
    room.spawn(CODE)
    first, second = room.waiter(), room.waiter()
    second.say("imported")
    assert room.told() == StandbyReady(seconds=0.5)
    assert room.told() == Spawned(runtime=CHAT, pid=second.pid)  # who came first, whoever is ready first
    first.say("imported")
    assert room.told() == Spawned(runtime=CODE, pid=first.pid)
    room.close()


def test_death_while_importing_leaves_the_spec_to_the_next(room: Room) -> None:
    room.spawn(CHAT)
    first = room.waiter()
    first.say("exit 3")
    second = room.ready_waiter()
    assert room.told() == Spawned(runtime=CHAT, pid=second.pid)
    assert (
        f"waiting worker {first.pid} ended: exit code 3; the next one starts in 0.1 s" in room.log.read_text()
    )


def test_imports_that_fail_twice_are_the_reason_that_clients_read(room: Room) -> None:
    spec = room.spawn(CHAT)
    for _ in range(2):
        room.waiter().say("fail SeamError: hook 3 is not attached")
    assert room.told() == WorkerExited(runtime=CHAT, pid=0, exit_code=1)
    assert "SeamError: hook 3 is not attached" in Path(spec.log_path).read_text()
    third = room.ready_waiter()  # it goes on trying, and what is repaired works
    room.spawn(CODE)
    assert room.told() == Spawned(runtime=CODE, pid=third.pid)
    log = room.log.read_text()
    assert "starts in 0.1 s" in log
    assert "starts in 0.2 s" in log


def test_a_log_that_cannot_be_written_ends_no_standby(room: Room) -> None:
    room.spawn(CHAT, log_path=room.folder / "gone" / "chat.log")
    for _ in range(2):
        room.waiter().say("fail SeamError: hook 3 is not attached")
    assert room.told() == WorkerExited(runtime=CHAT, pid=0, exit_code=1)
    third = room.ready_waiter()
    room.spawn(CODE)
    assert room.told() == Spawned(runtime=CODE, pid=third.pid)
    (line,) = [line for line in room.log.read_text().splitlines() if "never began" in line]
    assert "SeamError: hook 3 is not attached" in line and "No such file or directory" in line


def test_worker_that_says_what_does_not_decode_has_failed(room: Room) -> None:
    spec = room.spawn(CHAT)
    for _ in range(2):
        room.waiter().say('babble {"type":"ImportsFailed","reason":"cut')
    assert room.told() == WorkerExited(runtime=CHAT, pid=0, exit_code=1)
    assert (
        "its message of 37 bytes does not decode: Input data was truncated" in Path(spec.log_path).read_text()
    )
    third = room.ready_waiter()
    room.spawn(CODE)
    assert room.told() == Spawned(runtime=CODE, pid=third.pid)


def test_death_of_a_ready_worker_is_noticed_before_it_is_needed(room: Room) -> None:
    first = room.ready_waiter()
    os.kill(first.pid, signal.SIGKILL)
    second = room.waiter()
    second.say("imported")
    room.spawn(CHAT)
    assert room.told() == Spawned(runtime=CHAT, pid=second.pid)
    assert f"waiting worker {first.pid} ended: killed by SIGKILL" in room.log.read_text()


def test_kill_of_a_spec_that_waits_costs_no_waiting_worker(room: Room) -> None:
    waiter = room.waiter()
    room.spawn(CHAT)
    room.kill(CHAT)
    assert room.told() == WorkerExited(runtime=CHAT, pid=0, exit_code=-signal.SIGTERM)
    waiter.say("imported")
    assert room.told() == StandbyReady(seconds=0.5)
    room.spawn(CODE)
    assert room.told() == Spawned(runtime=CODE, pid=waiter.pid)
    assert waiter.took()[0] == CODE


@pytest.mark.parametrize(("env", "exit_code"), [({}, -signal.SIGTERM), ({"DEAF": "1"}, -signal.SIGKILL)])
def test_killed_worker_is_reported_when_its_session_is_gone(
    room: Room, env: dict[str, str], exit_code: int
) -> None:
    waiter = room.ready_waiter()
    room.spawn(CHAT, **env)
    assert isinstance(room.told(), Spawned)
    _, child = waiter.took()
    room.kill(CHAT, grace_s=0.2 if env else 60)
    assert room.told() == WorkerExited(runtime=CHAT, pid=waiter.pid, exit_code=exit_code)
    assert not Path(f"/proc/{waiter.pid}").exists()
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_all_go_with_the_standby(folder: Path, how: str) -> None:
    room = Room(folder, first=2, cores=6)
    ready, importing = room.waiter(), room.waiter()
    ready.say("imported")
    room.told()
    room.spawn(CHAT)
    room.told()
    _, child = ready.took()
    if how == "closed":
        assert room.close() == 0
        wait_for_end(child)
    else:
        room.process.kill()  # then the worker's child is ended by the supervisor
        room.process.wait()
        os.kill(child, signal.SIGKILL)
    for waiter in (ready, importing):
        wait_for_end(waiter.pid)


def test_nobody_waits_where_none_is_wanted_until_there_is_a_spec(folder: Path) -> None:
    room = Room(folder, first=0, cores=6)
    room.spawn(CHAT)
    waiter = room.ready_waiter()
    assert room.told() == Spawned(runtime=CHAT, pid=waiter.pid)
    assert room.waiter().pid != waiter.pid, "now one waits, as in any room"
    assert room.close() == 0, room.log.read_text()


def test_card_of_an_index_is_the_only_one_that_its_workers_see() -> None:
    assert one_card(1, {}) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1"}
    assert one_card(1, {"CUDA_VISIBLE_DEVICES": "4, GPU-7f"}) == {"CUDA_VISIBLE_DEVICES": "GPU-7f"}
    with pytest.raises(ConfigError, match=r"devices.index is 2, but CUDA_VISIBLE_DEVICES is 4,5"):
        one_card(2, {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_a_supervisor_that_ends_with_messages_unread_is_an_end_like_any_other(room: Room) -> None:
    """The kernel then says "connection reset" and not "end of file"."""
    waiter = room.waiter()
    waiter.say("imported")
    unread = socket.socket(fileno=os.dup(room.channel.fileno()))
    deadline = time.monotonic() + TIMEOUT_S
    while not _has_bytes(unread):
        assert time.monotonic() < deadline
    unread.close()
    # The fixture closes the channel without having read StandbyReady, and asks for exit code 0.


def _has_bytes(channel: socket.socket) -> bool:
    try:
        return bool(channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False
