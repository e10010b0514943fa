"""A waiting worker with a real SGLang: what has imported before a spec is what serves after it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
from setproctitle import setproctitle

from prism_sgl.engine import waiting
from prism_sgl.engine.early_children import EarlyChild, EarlyChildError
from prism_sgl.engine.spec import SPEC_VARIABLE
from prism_sgl.launch.processes import session_members
from prism_sgl.messages import ImportsFailed, decode_waiting_to_standby
from tests.engine.reference import MODEL_PATH, greedy
from tests.engine.specs import runtime_spec
from tests.engine.system import System
from tests.engine.test_tokens import long_prompt

LAUNCH = """
import sys
from prism_sgl.config import load
from prism_sgl.launch.supervisor import Programs, run
sys.exit(run(load(sys.argv[2]), programs=Programs(standby="tests.engine.programs.host_that_waits")))
"""
CONFIG = """
[server]
port = {port}
run_dir = "{folder}/run"
log_dir = "{folder}/logs"
drain_timeout = "2s"
[[devices]]
name = "host0"
kind = "host"
memory = "1120MiB"
[models.chat]
path = "{path}"
preload = false
max_kv = "64MiB"
[models.chat.engine_args]
context_length = 512
dtype = "float32"
max_running_requests = 16
"""
SPEC = runtime_spec()


@pytest.fixture
def waiting_system(tmp_path: Path) -> Iterator[System]:
    if not (MODEL_PATH / "config.json").exists():
        pytest.fail("no SmolLM2; run `make model`")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "models.toml"
    config.write_text(CONFIG.format(port=port, folder=tmp_path, path=MODEL_PATH))
    running = System(config, tmp_path / "run", tmp_path / "logs", port, program=("-c", LAUNCH))
    try:
        yield running
    finally:
        processes = running.processes()
        code = running.stop()
    assert code == 0, "\n".join(running.lines)
    assert not [line for pid, line in processes.items() if Path(f"/proc/{pid}").exists()]


@pytest.mark.engine
@pytest.mark.timeout(480)  # three processes import, on two cores; then a start; then the next three begin
def test_processes_that_waited_become_the_runtime(waiting_system: System) -> None:
    system = waiting_system
    system.wait_line("standby-host0: imports")
    before = set(system.processes())
    prompt = long_prompt(300, 20)
    answer = system.generate("chat", prompt, 8)
    assert answer["output_ids"] == greedy(tuple(prompt), 8)

    pids = system.runtime_pids("chat")
    assert pids["scheduler"] != pids["worker"]
    members = session_members(pids["worker"])
    assert set(members) <= before  # worker, scheduler, detokenizer, mp's resource tracker: none started since
    assert len(members) == 4
    chat_log = next(system.log_dir.glob("*chat*")).read_text()
    standby_log = (system.log_dir / "standby-host0.log").read_text()
    assert f"imports of {pids['worker']}: worker" in standby_log
    assert "Available plugins" not in chat_log
    assert "scheduler_e2e" in chat_log  # its children log there too, since they know whose they are
    phases = [line.split(": ", 1)[1] for line in system.lines if "] chat@host0." in line]
    parts = [phase for phase in phases if phase.startswith("engine, of which")]
    assert parts and parts[0].startswith("engine, of which load_weight ")
    whole = [phase.split(" ")[0] for phase in phases if phase not in parts]
    assert whole == ["starts", "imports", "engine", "ready"]
    assert phases[1] == "imports 0.0 s"  # what the spec had to wait for them

    # SGLang still finds out when one of its processes is gone.
    os.kill(pids["scheduler"], signal.SIGKILL)
    assert "chat@host0." in system.wait_line(": ended (exit code 1")
    assert not session_members(pids["worker"])


def test_reason_of_failed_imports_fits_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's output may be long, and a message that is cut does not decode."""

    def fail(channel: socket.socket, kind: str) -> None:
        raise RuntimeError("Error building extension: " + "\0" * 1_000_000)

    monkeypatch.setattr(waiting, "_import", fail)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with pytest.raises(RuntimeError):
            waiting._wait_and_serve(theirs, "host")
        message = decode_waiting_to_standby(ours.recv(1 << 16))
    assert isinstance(message, ImportsFailed)
    assert message.reason.startswith("RuntimeError: Error building extension: ")
    assert len(message.reason) == 2000


# -- early children by themselves


def nothing() -> None:
    """Imports that take no time."""


def failing() -> None:
    raise ImportError("no module named flash")


def vanishing() -> None:
    os._exit(7)


def report(word: str, pipe_writer: Connection) -> None:
    print("printed by the child", flush=True)
    pipe_writer.send((word, os.environ["SET_AT_THE_CALL"], multiprocessing.parent_process().pid))  # type: ignore[union-attr]


def test_child_runs_its_function_with_our_environment_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = EarlyChild("scheduler", nothing)
    assert child.wait_ready() >= 0
    spec = msgspec.structs.replace(SPEC, log_path=str(tmp_path / "chat.log"))
    monkeypatch.setenv(SPEC_VARIABLE, msgspec.json.encode(spec).decode())
    monkeypatch.setenv("SET_AT_THE_CALL", "yes")
    child.call(report, {"word": "hello"}, reports_as="pipe_writer")
    assert child.connection.recv() == ("hello", "yes", os.getpid())
    child.process.join()
    assert child.process.exitcode == 0
    assert "printed by the child" in (tmp_path / "chat.log").read_text()


def entitle(pipe_writer: Connection) -> None:
    """As SGLang does at the begin of its scheduler."""
    setproctitle("sglang::scheduler")
    pipe_writer.send(Path("/proc/self/cmdline").read_bytes().rstrip(b"\0 "))


def test_child_has_a_title_and_takes_sglangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at ps, or binds processes to cores, tells them apart by it."""
    child = EarlyChild("scheduler", nothing)
    child.wait_ready()
    shown = Path(f"/proc/{child.process.pid}/cmdline").read_bytes().rstrip(b"\0 ")
    assert shown == b"prism_sgl::scheduler"
    spec = msgspec.structs.replace(SPEC, log_path=str(tmp_path / "chat.log"))
    monkeypatch.setenv(SPEC_VARIABLE, msgspec.json.encode(spec).decode())
    child.call(entitle, {}, reports_as="pipe_writer")
    assert child.connection.recv() == b"sglang::scheduler"
    child.process.join()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (failing, "detokenizer: ImportError: no module named flash"),
        (vanishing, "detokenizer: ended with exit code 7"),
    ],
)
def test_child_that_cannot_import_says_why(prepare, words: str) -> None:  # type: ignore[no-untyped-def]
    child = EarlyChild("detokenizer", prepare)
    with pytest.raises(EarlyChildError, match=words):
        child.wait_ready()
    child.process.join()


def test_child_that_nobody_calls_ends_with_its_parent() -> None:
    child = EarlyChild("scheduler", nothing)
    child.wait_ready()
    child.connection.close()
    child.process.join()
    assert child.process.exitcode == 0
