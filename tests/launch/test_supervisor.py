"""The supervisor as a real process: its children really die, its files are really looked for."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_sgl.allocator.ledger import Ledger
from prism_sgl.config import load, restore
from prism_sgl.errors import EXIT_CONFIG, EXIT_OK, EXIT_UNAVAILABLE
from prism_sgl.launch.descriptors import soft_limit
from prism_sgl.launch.processes import session_members
from tests.launch.instance import Instance, free_port, is_alive, wait_for_end

TWO_MODELS = '[models.chat]\npath = "MODEL"\n[models.code]\npath = "MODEL"\naliases = ["c"]\n'
ONE_FAILS = TWO_MODELS + '[models.bad]\npath = "MODEL"\nengine_args = { fail = "no such layer" }\n'


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="prism-"))  # short: sockets live below it
    yield path
    shutil.rmtree(path)


@pytest.fixture
def instance(folder: Path) -> Iterator[Instance]:
    started = Instance.start(folder, free_port(), TWO_MODELS)
    started.line("try: curl")
    yield started
    if started.process.poll() is None or started.ledger.exists():
        started.process.kill()
        started.process.wait()
        again = Instance.start(folder, started.port)
        again.line("ready in")
        again.end()


def assert_nothing_left(instance: Instance, sessions: list[int]) -> None:
    assert not [pid for session in sessions for pid in session_members(session)]
    assert not instance.run_dir.exists()
    assert not instance.ledger.exists()
    with socket.create_server(("127.0.0.1", instance.port)):
        pass


def test_prints_phases_then_address_models_and_a_question(instance: Instance) -> None:
    text = "\n".join(instance.lines)
    assert "chat@host0.1: load_weights 0.2 s" in text
    assert "chat@host0.1: ready in 0.5 s" in text
    assert f"address: http://127.0.0.1:{instance.port}" in text
    assert "model: code (c): ready on host0" in text
    assert "\x1b" not in text
    assert instance.end() == EXIT_OK


def test_sigterm_leaves_no_process_and_no_file(instance: Instance) -> None:
    sessions = list(instance.pids().values())
    assert len(sessions) == 5  # router, api_server, standby, two workers
    assert instance.ledger.exists()
    assert instance.end() == EXIT_OK
    assert_nothing_left(instance, sessions)


def test_second_signal_stops_at_once(instance: Instance) -> None:
    sessions = list(instance.pids().values())
    os.kill(instance.pids()["api_server"], signal.SIGSTOP)  # it will never drain
    instance.process.send_signal(signal.SIGINT)
    instance.line("stopping")
    instance.process.send_signal(signal.SIGINT)
    assert instance.wait() == EXIT_OK
    assert not any("did not stop" in line for line in instance.lines)
    assert_nothing_left(instance, sessions)


def test_children_die_with_a_killed_supervisor_and_the_next_start_cleans_up(instance: Instance) -> None:
    sessions = list(instance.pids().values())
    instance.process.kill()
    instance.process.wait()
    for pid in sessions:
        wait_for_end(pid)
    assert instance.ledger.exists()
    again = Instance.start(instance.folder, instance.port, TWO_MODELS)
    again.line(f"removed {instance.ledger}")
    again.line("try: curl")
    sessions += list(again.pids().values())
    assert again.end() == EXIT_OK
    assert_nothing_left(again, sessions)


def test_next_start_ends_processes_that_outlived_a_killed_supervisor(instance: Instance) -> None:
    worker = instance.pids()["chat@host0.1"]
    (sleeper,) = [pid for pid in session_members(worker) if pid != worker]  # it set no death signal
    instance.process.kill()
    instance.process.wait()
    wait_for_end(worker)
    assert is_alive(sleeper)
    again = Instance.start(instance.folder, instance.port, TWO_MODELS)
    again.line(f"removed process {sleeper}")
    assert not is_alive(sleeper)
    again.line("try: curl")
    assert again.end() == EXIT_OK


def test_pid_that_belongs_to_another_process_now_is_spared(instance: Instance, folder: Path) -> None:
    pids = instance.run_dir / "pids"
    instance.process.kill()
    instance.process.wait()
    pids.write_text(f"{os.getpid()} 1 router\n")  # we did not begin one tick after boot
    again = Instance.start(folder, instance.port, TWO_MODELS)
    again.line("try: curl")
    assert again.end() == EXIT_OK


@pytest.mark.parametrize("name", ["router", "api_server"])
def test_killed_service_starts_again(instance: Instance, name: str) -> None:
    before = instance.pids()
    os.kill(before[name], signal.SIGKILL)
    assert "killed by SIGKILL" in instance.line(f"{name}: ended")
    if name == "api_server":
        assert int(instance.ask()[0]) != before[name]  # waited in the backlog, was not refused
    else:
        os.kill(before["api_server"], signal.SIGKILL)
        instance.line("api_server: ended")
        instance.ask()
    after = instance.pids()
    assert after["chat@host0.1"] == before["chat@host0.1"]  # workers are not touched
    assert instance.end() == EXIT_OK


def test_full_run_dir_and_logs_that_were_tidied_away_end_no_engine(instance: Instance) -> None:
    before = instance.pids()
    (instance.run_dir / "pids.new").mkdir()  # in the way, as a full disk is
    shutil.rmtree(instance.run_dir / "logs")
    os.kill(before["api_server"], signal.SIGKILL)
    instance.line("pids.new cannot be written")
    instance.line("api_server: ended")
    assert int(instance.ask()[0]) != before["api_server"]
    assert is_alive(before["chat@host0.1"])
    assert instance.end() == EXIT_OK
    assert_nothing_left(instance, list(before.values()))


def test_new_router_is_told_which_runtimes_live(instance: Instance) -> None:
    os.kill(instance.pids()["router"], signal.SIGKILL)
    instance.line("router: ended")
    # What the router stops then is reported as wanted, and started anew by it.
    stops = instance.line("was told of chat@host0.1 code@host0.2")
    assert "code@host0.2: stops" in stops
    instance.line("code@host0.2: ended (router")
    instance.line("code@host0.1: ready")
    assert f"{instance.pids()['router']} RuntimeExited(runtime='code@host0.2'" in instance.router_log()
    assert "expected=True" in instance.router_log()
    # Nothing went wrong, so no line of its log says why.
    assert "reason='killed by SIGKILL', error='', expected=True" in instance.router_log()
    assert instance.end() == EXIT_OK


def test_service_starts_again_with_the_checked_configuration_when_files_have_changed(
    instance: Instance,
) -> None:
    checked = load(instance.config)
    (instance.folder / "model" / "config.json").write_text("{")
    instance.config.unlink()
    os.kill(instance.pids()["router"], signal.SIGKILL)
    instance.line("was told of chat@host0.1 code@host0.2")
    saved = instance.run_dir / "config.json"
    assert restore(saved) == checked
    assert saved.stat().st_mode & 0o777 == 0o600
    assert instance.end() == EXIT_OK


def test_children_may_have_more_clients_than_the_usual_limit(folder: Path) -> None:
    """1024, as shells and systemd have it."""
    usual = ("sh", "-c", 'ulimit -Sn 1024 && exec "$@"', "sh")
    instance = Instance.start(folder, free_port(), wrapper=usual)
    instance.line("try: curl")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = {name: resource.prlimit(pid, resource.RLIMIT_NOFILE) for name, pid in instance.pids().items()}
    assert limits == dict.fromkeys(
        ["standby-host0", "router", "api_server", "chat@host0.1"], (soft_limit(1024, hard), hard)
    )
    assert instance.end() == EXIT_OK


def test_death_of_a_standby_ends_its_workers_and_reports_each(instance: Instance) -> None:
    before = instance.pids()
    workers = [before["chat@host0.1"], before["code@host0.2"]]
    os.kill(before["standby-host0"], signal.SIGKILL)
    instance.line("standby-host0: ended")
    assert not [pid for worker in workers for pid in session_members(worker)]
    instance.line("ready in 0.5 s")
    instance.line("ready in 0.5 s")
    log = instance.router_log()
    assert "RuntimeExited(runtime='chat@host0.1'" in log
    assert "RuntimeExited(runtime='code@host0.2'" in log
    assert instance.end() == EXIT_OK


_JOIN_AND_DIE = """
import os, sys
from prism_sgl.allocator.ledger import Kind, Ledger
owner = Ledger.open(sys.argv[1]).join("chat@host0.1", floor=0, ceiling=8, priority=0, bell="")
assert owner.try_reserve(Kind.KV, 3)
os._exit(0)
"""


def test_what_a_dead_runtime_of_the_host_held_is_free_though_nobody_asks_for_it(instance: Instance) -> None:
    subprocess.run([sys.executable, "-c", _JOIN_AND_DIE, str(instance.ledger)], check=True)
    with Ledger.open(str(instance.ledger)) as ledger:
        assert ledger.totals().returning == 3
        os.kill(instance.pids()["standby-host0"], signal.SIGKILL)
        instance.line("chat@host0.1: ended")
        instance.line("code@host0.2: ended")
        assert ledger.totals().free == ledger.budget
    assert instance.end() == EXIT_OK


def test_failed_model_is_named_with_its_reason_and_the_others_serve(folder: Path) -> None:
    instance = Instance.start(folder, free_port(), ONE_FAILS)
    instance.line("try: curl")
    text = "\n".join(instance.lines)
    assert "model: bad: failed: exit code 1: RuntimeError: no such layer" in text
    assert "model: chat: ready on host0" in text
    assert instance.end() == EXIT_OK


def test_children_get_private_temporary_files_and_the_ledgers(instance: Instance) -> None:
    _, temporary, ledgers = instance.ask()
    assert temporary == str(instance.run_dir / "tmp")
    assert Path(temporary).stat().st_mode & 0o777 == 0o700
    assert ledgers == f"host0={instance.ledger}"
    assert instance.run_dir.stat().st_mode & 0o777 == 0o700
    assert instance.end() == EXIT_OK


def test_port_in_use_is_told_before_anything_starts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        instance = Instance.start(folder, port)
        assert instance.wait() == EXIT_UNAVAILABLE
    assert instance.lines == [
        f"{instance.config}: server.port is {port}, which is in use on 127.0.0.1; "
        "stop what listens there or give another port"
    ]
    assert not instance.run_dir.exists()


def test_second_instance_in_the_same_folder_is_refused(instance: Instance, folder: Path) -> None:
    other = Instance.start(folder, free_port())
    assert other.wait() == EXIT_UNAVAILABLE
    assert "is in use by another instance" in other.lines[0]
    instance.ask()
    assert instance.end() == EXIT_OK


def test_folder_that_others_can_write_is_refused(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run").chmod(0o777)
    instance = Instance.start(folder, free_port())
    assert instance.wait() == EXIT_CONFIG
    assert "is not a folder of this user alone" in instance.lines[0]


@pytest.mark.parametrize("place", ["models.toml/logs", "models.toml"])
def test_log_dir_that_cannot_be_written_is_told_before_anything_starts(folder: Path, place: str) -> None:
    instance = Instance.start(folder, free_port(), server=f'log_dir = "{folder}/{place}"')
    assert instance.wait() == EXIT_CONFIG
    (line,) = instance.lines
    assert line.startswith(
        f'{instance.config}: server.log_dir is "{folder}/{place}", which cannot be written to ('
    )
    assert line.endswith("; give a folder that this user may write to, or leave it out")
    assert not instance.run_dir.exists()
    assert not instance.ledger.exists()


def test_server_under_nohup_outlives_its_terminal(folder: Path) -> None:
    instance = Instance.start(folder, free_port(), wrapper=["nohup"])
    instance.line("try: curl")
    status = Path(f"/proc/{instance.process.pid}/status").read_text()
    (ignored,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:")]
    instance.process.send_signal(signal.SIGHUP)
    instance.ask()
    assert instance.end() == EXIT_OK
    assert ignored & 1 << (signal.SIGHUP - 1)
