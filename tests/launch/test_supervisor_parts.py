"""Parts of the supervisor by themselves."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from prism_sgl import addresses
from prism_sgl.backoff import Backoff
from prism_sgl.config import Config, DeviceConfig, MemoryConfig, ModelConfig, SchedulerConfig, ServerConfig
from prism_sgl.errors import LedgerError, describe_exit
from prism_sgl.launch.banner import curl_line, ready_lines
from prism_sgl.launch.children import Child, start_child, why_ended
from prism_sgl.launch.descriptors import soft_limit
from prism_sgl.launch.processes import end_sessions, read_stat, session_members
from prism_sgl.launch.progress import Progress
from prism_sgl.launch.run_dir import RunDir
from prism_sgl.launch.runtimes import build_spec
from prism_sgl.launch.service import Service
from prism_sgl.launch.standby import HostShare, StandbyLink, share_host
from prism_sgl.launch.supervisor import run
from prism_sgl.messages import RuntimeId
from tests.launch.instance import free_port

RUNTIME = RuntimeId("org/chat@host0.3")


def make_config(tmp_path: Path, **server: object) -> Config:
    return Config(
        server=ServerConfig(run_dir=str(tmp_path), **server),  # type: ignore[arg-type]
        memory=MemoryConfig(),
        scheduler=SchedulerConfig(),
        devices=(DeviceConfig(name="host0", kind="host", memory_bytes=1 << 30),),
        models={
            "org/chat": ModelConfig(
                name="org/chat", path="/m", aliases=("c",), min_kv_bytes=7, env={"A": "b"}, priority=2
            )
        },
    )


def test_backoff_doubles_to_five_seconds_and_forgets_after_a_good_life() -> None:
    backoff = Backoff()
    assert [backoff.after(0.0) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.after(31.0) == 0.1


def test_exit_is_told_in_words() -> None:
    assert [describe_exit(code) for code in (0, 78, -9)] == [
        "exit code 0",
        "exit code 78",
        "killed by SIGKILL",
    ]


def test_reason_is_the_last_error_of_the_log_not_the_source_above_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        'Traceback\n  File "x"\n    raise ValueError("y")\na.b.SeamError: hook 3 is not attached\nbye\n'
    )
    assert why_ended(1, log) == "a.b.SeamError: hook 3 is not attached"
    assert why_ended(-signal.SIGABRT, log) == "a.b.SeamError: hook 3 is not attached"
    log.write_text("models.toml: nothing that looks like an error\n\n")
    assert why_ended(1, log) == "models.toml: nothing that looks like an error"
    assert why_ended(1, tmp_path / "none") == ""


def test_requests_in_the_log_are_not_quoted(tmp_path: Path) -> None:
    """What is said here is seen by all clients: in errors, in the state of models, in events."""
    log = tmp_path / "log"
    log.write_text("[2026-11-29 11:50:26] Receive: obj=GenerateReqInput(text='an ERROR of mine')\n")
    for code in (1, -signal.SIGSEGV, -signal.SIGTERM):
        assert why_ended(code, log, served=True) == ""
    assert "dmesg" in why_ended(-signal.SIGKILL, log, served=True)


def test_sglang_that_kills_itself_when_a_model_does_not_load_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("[2026-11-29 11:50:26] EngineError: scheduler_0 is gone\n[2026-11-29 11:50:27] bye\n")
    for code in (1, -signal.SIGKILL, -signal.SIGTERM):
        assert why_ended(code, log) == "EngineError: scheduler_0 is gone"
    assert why_ended(1, log, served=True) == "EngineError: scheduler_0 is gone"
    assert "dmesg" in why_ended(-signal.SIGKILL, log, served=True), "somebody else did that"


def test_phases_are_printed_once_and_only_whole_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    progress = Progress(out)
    progress.watch(str(tmp_path), RUNTIME)
    assert progress.poll() == []
    file = Path(addresses.phases(str(tmp_path), RUNTIME))
    file.write_text("load weights 1.5\nnonsense\nready 2")
    assert progress.poll() == []
    with file.open("a") as more:
        more.write(".0\n")
    assert progress.poll() == [RUNTIME]
    assert progress.poll() == []
    lines = [line.split("] ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines == [f"{RUNTIME}: load weights 1.5 s", f"{RUNTIME}: ready in 2.0 s"]


def test_event_is_one_line_whatever_the_reason_holds() -> None:
    out = io.StringIO()
    Progress(out).line("chat: ended (\n  two\nlines)")
    assert out.getvalue().endswith("chat: ended ( two lines)\n")


def test_terminal_that_lacks_a_character_does_not_end_the_instance() -> None:
    shown = io.BytesIO()
    out = io.TextIOWrapper(shown, encoding="latin-1")
    Progress(out).line("chat: ended (RuntimeError: “no kernel”, schön)")
    assert shown.getvalue().decode("latin-1").endswith("chat: ended (RuntimeError: ?no kernel?, schön)\n")


def test_service_that_cannot_be_started_again_is_tried_until_it_can(tmp_path: Path) -> None:
    out = io.StringIO()
    log = tmp_path / "logs" / "service.log"
    failures: list[BaseException] = []
    refusals = iter([BlockingIOError(errno.EAGAIN, "no process to be had"), OSError(errno.ENOSPC, "full")])
    starts: list[Child] = []

    def start() -> Child:
        if starts and (refusal := next(refusals, None)):
            raise refusal
        starts.append(start_child("service", "http.server", ["0"], env=os.environ, log=log))
        if len(starts) == 2:
            again.set()
        return starts[-1]

    async def serve() -> None:
        directory = RunDir(str(tmp_path / "run"), 1)
        directory.acquire()
        service = Service(
            "service", start, None, run_dir=directory, progress=Progress(out), log=log, fail=failures.append
        )
        service.begin()
        shutil.rmtree(log.parent)  # somebody tidies up
        service.send_signal(signal.SIGKILL)
        await asyncio.wait_for(again.wait(), 30)
        await service.stop(signal.SIGKILL, 10)
        directory.remove()

    again = asyncio.Event()
    asyncio.run(serve())
    assert failures == []
    lines = [line.split("] ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines.pop(0).startswith("service: ended (killed by SIGKILL")
    assert lines == [
        f"service: could not be started ([Errno {errno.EAGAIN}] no process to be had); starts again in 0.2 s",
        f"service: could not be started ([Errno {errno.ENOSPC}] full); starts again in 0.4 s",
    ]
    assert log.exists()


def test_service_that_cannot_be_started_again_can_be_stopped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    starts: list[Child] = []
    failures: list[BaseException] = []

    def start() -> Child:
        if starts:
            refused.set()
            raise BlockingIOError(errno.EAGAIN, "no process to be had")
        starts.append(start_child("service", "no_such_module", [], env=os.environ, log=log))
        return starts[-1]

    async def serve() -> None:
        directory = RunDir(str(tmp_path / "run"), 1)
        directory.acquire()
        progress = Progress(io.StringIO())
        service = Service(
            "service", start, None, run_dir=directory, progress=progress, log=log, fail=failures.append
        )
        service.begin()
        await asyncio.wait_for(refused.wait(), 30)
        await asyncio.wait_for(service.stop(signal.SIGTERM, 30), 10)
        directory.remove()

    refused = asyncio.Event()
    asyncio.run(serve())
    assert failures == []


def test_process_that_cannot_be_watched_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []

    def refuse(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("os.pidfd_open", refuse)

    async def start() -> None:
        start_child("service", "http.server", ["0"], env=os.environ, log=tmp_path / "log")

    with pytest.raises(OSError, match="too many open files"):
        asyncio.run(start())
    assert read_stat(pids[0]) is None


def shares(
    num_cards: int, *, start_parallel: int, cores: int, allowed: tuple[str, ...] = ()
) -> dict[str, HostShare]:
    cards = [
        DeviceConfig(name=f"gpu{i}", kind="cuda", index=i, memory_bytes=1 << 30) for i in range(num_cards)
    ]
    config = Config(
        server=ServerConfig(),
        memory=MemoryConfig(),
        scheduler=SchedulerConfig(start_parallel=start_parallel),
        devices=(*cards, DeviceConfig(name="host0", kind="host", memory_bytes=1 << 30)),
        models={"chat": ModelConfig(name="chat", path="/m", devices=allowed)},
    )
    return share_host(config, cores)


@pytest.mark.parametrize(
    ("num_cards", "start_parallel", "waiting"),
    [(1, 2, [2]), (3, 8, [3, 3, 2]), (8, 2, [1] * 8), (8, 8, [1] * 8), (2, 1, [1, 1])],
)
def test_as_many_workers_wait_on_all_cards_as_may_start_at_once_and_one_beside_each(
    num_cards: int, start_parallel: int, waiting: list[int]
) -> None:
    given = shares(num_cards, start_parallel=start_parallel, cores=16)
    assert [given[f"gpu{i}"].num_waiting for i in range(num_cards)] == waiting
    assert given["host0"].num_waiting == 0, "forked when they are wanted"


def test_cores_are_parted_among_the_cards_whose_workers_import() -> None:
    assert {share.num_cores for share in shares(8, start_parallel=2, cores=128).values()} == {16}
    assert {share.num_cores for share in shares(8, start_parallel=2, cores=4).values()} == {1}
    assert {share.num_cores for share in shares(0, start_parallel=2, cores=4).values()} == {4}


def test_nobody_waits_beside_a_card_that_no_model_may_come_to() -> None:
    given = shares(3, start_parallel=4, cores=16, allowed=("gpu1", "host0"))
    nobody = HostShare(0, 0, 16)
    assert [given[f"gpu{i}"] for i in range(3)] == [nobody, HostShare(4, 1, 16), nobody]


def test_standby_is_told_its_device_and_its_share(tmp_path: Path) -> None:
    device = DeviceConfig(name="device0", kind="cuda", memory_bytes=1 << 30, index=1)

    def command_line(pid: int) -> list[str]:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")

    async def arguments() -> list[str]:
        ready = asyncio.Event()
        link = StandbyLink(device, HostShare(3, 8, 5), lambda _device, _message: ready.set())
        child = link.start("tests.launch.programs.tiny_standby", env=os.environ, log=tmp_path / "log")
        try:
            await ready.wait()
            return command_line(child.pid)
        finally:
            link.close()
            await child.exited

    given = asyncio.run(arguments())
    shown = {"--kind": "cuda", "--index": "1", "--waiting": "3", "--expected": "8", "--cores": "5"}
    assert {option: given[given.index(option) + 1] for option in shown} == shown


def test_standby_that_cannot_be_started_leaves_no_socket(tmp_path: Path) -> None:
    device = DeviceConfig(name="device0", kind="host", memory_bytes=1 << 30)
    (tmp_path / "file").touch()
    link = StandbyLink(device, HostShare(0, 0, 1), lambda _device, _message: None)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError) as caught:
        link.start("tests.launch.programs.tiny_standby", env=os.environ, log=tmp_path / "file" / "log")
    assert os.listdir("/proc/self/fd") == before, caught  # whose frames hold what was not closed


def test_spec_has_all_that_the_worker_needs(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    model, device = config.models["org/chat"], config.devices[0]
    spec = build_spec(config, RUNTIME, model, device, tmp_path, "/dev/shm/x")
    assert (spec.floor_bytes, spec.ceiling_bytes, spec.priority, spec.env) == (7, 0, 2, {"A": "b"})
    assert spec.log_path == f"{tmp_path}/logs/rt-org_chat@host0.3.log"
    assert (spec.device, spec.device_kind, spec.ledger_path) == ("host0", "host", "/dev/shm/x")


def test_ready_lines_give_an_address_that_can_be_asked(tmp_path: Path) -> None:
    open_to_all = make_config(tmp_path, host="0.0.0.0", api_keys=("k",))
    lines = list(ready_lines(open_to_all, {}))
    assert lines[0] == "address: http://127.0.0.1:30000"
    assert lines[1] == "model: org/chat (c): starts at its first request"
    assert 'Bearer $PRISM_API_KEY"' in lines[2]
    assert "http://[::2]:30000/v1" in curl_line(make_config(tmp_path, host="::2"))


def test_ended_session_takes_children_that_left_it(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    assert session_members(child) == [child]
    assert sorted(end_sessions([leader.pid])) == sorted([leader.pid, child])
    assert leader.wait() == -signal.SIGKILL
    assert session_members(child) == []
    leader.stdout.close()


def test_start_time_tells_a_process_from_the_next_of_its_pid() -> None:
    ours = read_stat(os.getpid())
    assert ours is not None
    assert (ours.session, ours.parent) == (os.getsid(0), os.getppid())
    assert read_stat(2**22 + 1) is None


def test_failure_before_the_first_child_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", port=free_port())
    no_file = DeviceConfig(name="gone/host0", kind="host", memory_bytes=1 << 30)
    with pytest.raises(LedgerError, match="gone"):
        run(msgspec.structs.replace(config, devices=(no_file,)), out=io.StringIO())
    assert not (tmp_path / "run").exists()


def test_descriptors_are_as_many_as_allowed_and_never_fewer_than_before() -> None:
    no_limit = resource.RLIM_INFINITY
    given = [(1024, 524288), (1024, 4096), (4096, 4096), (100_000, 524288), (1024, no_limit), (no_limit,) * 2]
    assert [soft_limit(soft, hard) for soft, hard in given] == [65535, 4096, 4096, 100_000, 65535, no_limit]
