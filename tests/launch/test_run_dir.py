"""The private folder: what a killed instance left goes, what anybody else put there stays."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prism_sgl.errors import ConfigError
from prism_sgl.launch.run_dir import SHM_FOLDER, RunDir, remove_listed

_ACQUIRE_AND_DIE = """
import os, sys
from prism_sgl.launch.run_dir import RunDir
RunDir(sys.argv[1], 1).acquire()
os._exit(0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


def test_listed_files_are_removed_only_from_dev_shm(tmp_path: Path) -> None:
    listed = SHM_FOLDER / f"prism-test-{os.getpid()}.shm"
    elsewhere = tmp_path / "elsewhere"
    for file in (listed, elsewhere):
        file.touch()
    listing = tmp_path / "rt-a.shm"
    listing.write_text(f"{listed}\n{elsewhere}\n/dev/shm/../..{elsewhere}\n/dev/shm/none\n")
    assert remove_listed(listing) == [str(listed)]
    assert elsewhere.exists()
    assert not listing.exists()
    assert remove_listed(listing) == []


def test_what_a_killed_instance_left_is_removed(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", _ACQUIRE_AND_DIE, str(folder)], check=True)
    left = [folder / "logs", folder / "tmp", folder / "pids", folder / "router-api.sock"]
    ledger = SHM_FOLDER / f"prism_sgl-{os.getuid()}-1-host0.ledger"
    for file in (*left[2:], ledger):
        file.touch()
    run_dir = RunDir(str(folder), 1)
    run_dir.acquire()
    assert sorted(run_dir.swept) == sorted(map(str, [*left, ledger]))
    assert sorted(entry.name for entry in folder.iterdir()) == ["lock", "logs", "tmp"]
    run_dir.remove()
    assert not folder.exists()


def test_empty_folder_and_one_whose_instance_died_at_birth_are_taken(folder: Path) -> None:
    for names in ((), ("lock",)):
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            (folder / name).touch()
        run_dir = RunDir(str(folder), 1)
        run_dir.acquire()
        assert run_dir.swept == []
        run_dir.remove()
        assert not folder.exists()


@pytest.mark.parametrize(
    "lock", [None, "", "pid 7\n"], ids=["no lock", "empty lock", "lock of another program"]
)
def test_folder_that_holds_files_of_others_is_refused_and_left_as_it_is(
    folder: Path, lock: str | None
) -> None:
    (folder / "models").mkdir()
    for name in ("a.txt", "b.txt", "models/model.safetensors"):
        (folder / name).write_text("precious")
    if lock is not None:
        (folder / "lock").write_text(lock)
    before = {path: path.is_file() and path.read_text() for path in folder.rglob("*")}
    with pytest.raises(ConfigError, match=r"holds a\.txt, b\.txt, .*; give an empty or new folder") as caught:
        RunDir(str(folder), 1).acquire()
    assert caught.value.key == "server.run_dir"
    assert {path: path.is_file() and path.read_text() for path in folder.rglob("*")} == before


def test_lock_of_another_program_alone_is_no_empty_folder(folder: Path) -> None:
    (folder / "lock").write_text("pid 7\n")
    with pytest.raises(ConfigError, match="holds lock, but no lock that prism_sgl has written"):
        RunDir(str(folder), 1).acquire()
    assert (folder / "lock").read_text() == "pid 7\n"


def test_session_list_that_cannot_be_written_is_told_once_and_tried_again(folder: Path) -> None:
    told: list[str] = []
    run_dir = RunDir(str(folder), 1, told.append)
    run_dir.acquire()
    (folder / "pids.new").mkdir()  # in the way, as a full disk is
    run_dir.record(os.getpid(), "router")
    run_dir.record(os.getppid(), "api_server")
    (line,) = told
    assert "pids.new cannot be written" in line and "make room" in line
    (folder / "pids.new").rmdir()
    run_dir.forget(os.getppid())
    assert (folder / "pids").read_text().endswith(" router\n")
    (folder / "pids").unlink()  # of this process, which end_all() would kill
    run_dir.remove()
    assert len(told) == 1


def test_lock_that_is_no_file_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds lock"):
        RunDir(str(folder), 1).acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_folder_is_locked_against_aging_while_it_is_held(folder: Path) -> None:
    def age() -> None:
        """As systemd-tmpfiles begins with each folder; one that is locked it leaves alone."""
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(fd)

    age()
    run_dir = RunDir(str(folder), 1)
    run_dir.acquire()
    with pytest.raises(BlockingIOError):
        age()
    run_dir.remove()
    assert not folder.exists()


def test_folder_that_somebody_has_removed_is_no_error_at_the_end(folder: Path) -> None:
    run_dir = RunDir(str(folder), 1)
    run_dir.acquire()
    ledger = Path(run_dir.ledger_path("host0"))
    ledger.touch()
    before = len(os.listdir("/proc/self/fd"))
    shutil.rmtree(folder)
    run_dir.remove()
    assert not ledger.exists()
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_folder_that_is_another_instances_by_now_is_left_to_it(folder: Path) -> None:
    first, second = RunDir(str(folder), 1), RunDir(str(folder), 2)
    first.acquire()
    shutil.rmtree(folder)
    second.acquire()
    first.remove()
    assert sorted(entry.name for entry in folder.iterdir()) == ["lock", "logs", "tmp"]
    second.remove()
    assert not folder.exists()
