"""Log files: which stay, and that those of long lives are cut short."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from prism_sgl.launch import logs
from prism_sgl.launch.logs import KEPT_LOGS, begin_log, keep_logs_short, shorten
from tests.launch.stack import wait_for


def test_log_begins_empty_and_the_oldest_of_the_model_go(tmp_path: Path) -> None:
    def log(number: int, model: str = "org_chat") -> Path:
        path = tmp_path / f"rt-{model}@host0.1-{number}.log"
        path.write_text("x")
        os.utime(path, (number, number))
        return path

    of_model = [log(number) for number in range(KEPT_LOGS + 3)]
    stranger = log(0, "org_chatty")
    cut = of_model[0].rename(f"{of_model[0]}.old")  # the living one's earlier lines
    of_model[0].touch()
    begin_log(of_model[-1], living=[of_model[0]])
    assert not of_model[-1].exists()
    assert Path(f"{of_model[-1]}.old").exists()
    gone = [path for path in of_model[:-1] if not path.exists()]
    assert gone == of_model[1:3], "the living one stays, and the newest: that of the earlier launch and nine"
    assert stranger.exists()
    assert cut.exists()


def test_log_folder_that_is_gone_is_made_again(tmp_path: Path) -> None:
    begin_log(tmp_path / "logs" / "rt-chat@host0.1.log", living=[])
    assert (tmp_path / "logs").is_dir()


def test_a_log_that_is_long_is_cut_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    with path.open("ab") as sink:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=sink)
    assert writer.stdin is not None
    try:
        for line in (b"first\n", b"second\n"):
            writer.stdin.write(line)
            writer.stdin.flush()
            wait_for("written", lambda line=line: path.read_bytes().endswith(line))  # type: ignore[misc]
            shorten(path, max_bytes=6)
        assert path.read_bytes() == b"", "seven bytes were too many"
        assert Path(f"{path}.old").read_bytes() == b"first\nsecond\n", "the first six were not"
        writer.stdin.write(b"third\n")
    finally:
        writer.stdin.close()
        writer.wait()
    assert path.read_bytes() == b"third\n", "no hole before it"
    assert os.stat(f"{path}.old").st_mode & 0o777 == 0o600


def test_a_log_is_cut_even_if_there_is_no_room_for_its_copy(tmp_path: Path) -> None:
    path = tmp_path / "router.log"
    path.write_text("long")
    Path(f"{path}.old").mkdir()
    shorten(path, max_bytes=3)
    assert path.read_text() == ""


def test_all_logs_of_the_living_are_looked_at_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughError(Exception):
        pass

    def look(path: Path) -> None:
        looked.append(path)
        living.append(Path("new.log"))
        if len(looked) == 4:
            raise EnoughError

    looked: list[Path] = []
    living = [Path("router.log")]
    monkeypatch.setattr(logs, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(logs, "shorten", look)
    with pytest.raises(EnoughError):
        asyncio.run(asyncio.wait_for(keep_logs_short(lambda: living), 10))
    assert looked == [Path("router.log"), Path("router.log"), Path("new.log"), Path("router.log")]
