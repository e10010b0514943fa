from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism_sgl.allocator import crash_points
from prism_sgl.allocator.ledger import Kind, Ledger, Owner
from prism_sgl.allocator.ledger_table import FILE_BYTES, NUM_SLOTS, VERSION, Header
from prism_sgl.errors import LedgerError
from prism_sgl.messages import RuntimeState
from prism_sgl.units import GRANULE_BYTES
from property_tests.ledger_process import LedgerProcess
from tests.allocator.conftest import BUDGET, join


@pytest.fixture
def process(ledger: Ledger) -> Iterator[LedgerProcess]:
    process = LedgerProcess()
    assert process.ask(do="join", path=ledger.path, name="other", floor=0, ceiling=BUDGET)
    yield process
    process.kill()


# ---------------------------------------------------------------- the file


def test_the_file_is_private_and_complete(ledger: Ledger) -> None:
    status = os.stat(ledger.path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == FILE_BYTES
    assert ledger.budget == BUDGET
    with pytest.raises(LedgerError, match="another instance"):
        Ledger.create(ledger.path, GRANULE_BYTES, "host0")


def test_remove_is_done_once_or_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger")
    Ledger.create(path, GRANULE_BYTES, "host0").close()
    Ledger.remove(path)
    Ledger.remove(path)
    with pytest.raises(LedgerError, match="launch"):
        Ledger.open(path)


def test_a_budget_is_at_least_a_granule(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="at least 2MiB"):
        Ledger.create(str(tmp_path / "ledger"), GRANULE_BYTES - 1, "host0")
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [
        (Header.MAGIC, 0, "no ledger"),
        (Header.VERSION, VERSION + 1, f"version {VERSION + 1}"),
        (Header.NUM_SLOTS, NUM_SLOTS * 2, f"{NUM_SLOTS * 2} slots"),
        (Header.BUDGET, 0, "budget"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, word: int, value: int, says: str) -> None:
    path = tmp_path / "ledger"
    Ledger.create(str(path), GRANULE_BYTES, "host0").close()
    data = bytearray(path.read_bytes())
    struct.pack_into("q", data, word * 8, value)
    path.write_bytes(data)
    with pytest.raises(LedgerError, match=says):
        Ledger.open(str(path))


def test_a_short_or_a_public_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    Ledger.create(str(path), GRANULE_BYTES, "host0").close()
    path.chmod(0o644)
    with pytest.raises(LedgerError, match="private"):
        Ledger.open(str(path))
    path.chmod(0o600)
    os.truncate(path, 100)
    with pytest.raises(LedgerError, match="100 bytes"):
        Ledger.open(str(path))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(LedgerError):
        Ledger.open(str(tmp_path / "link"))


def test_no_room_for_the_file_is_an_error_and_leaves_none(tmp_path: Path) -> None:
    code = f"""
import resource
from prism_sgl.allocator.ledger import Ledger
from prism_sgl.errors import LedgerError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    Ledger.create({str(tmp_path / "ledger")!r}, 1 << 30, "host0")
except LedgerError as error:
    print(error)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "free some space" in child.stdout
    assert not (tmp_path / "ledger").exists()


# ---------------------------------------------------------------- owners


def test_an_owner_is_seen_by_all(ledger: Ledger) -> None:
    owner = ledger.join("chat@host0.1", floor=3, ceiling=40, priority=-2, bell="/run/bell-1")
    assert owner.try_reserve(Kind.KV, 5)
    with Ledger.open(ledger.path) as other:
        (view,) = other.owners()
    assert (view.name, view.bell, view.pid, view.epoch) == ("chat@host0.1", "/run/bell-1", os.getpid(), 1)
    assert (view.state, view.priority, view.alive) == (RuntimeState.STARTING, -2, True)
    assert (view.floor, view.ceiling, view.kv, view.held, view.surplus) == (3, 40, 5, 5, 2)
    owner.set_state(RuntimeState.ASLEEP)
    owner.set_quota(0, 10)
    assert (owner.view.state, owner.view.floor, owner.view.ceiling) == (RuntimeState.ASLEEP, 0, 10)


def test_the_sum_of_leases_stays_within_the_budget(ledger: Ledger, owner: Owner) -> None:
    other = join(ledger, "code")
    assert owner.try_reserve(Kind.WEIGHTS, 60)
    assert not other.try_reserve(Kind.KV, 41)
    assert other.try_reserve(Kind.KV, 40)
    assert not owner.try_reserve(Kind.OVERHEAD, 1)
    assert ledger.totals().free == 0
    other.release(Kind.KV, 10)
    assert owner.reserve_up_to(Kind.OVERHEAD, 20, step=4) == 8
    assert owner.reserve_up_to(Kind.OVERHEAD, 20, step=4) == 0
    totals = ledger.totals()
    assert (totals.budget, totals.leased, totals.returning, totals.free) == (BUDGET, 98, 0, 2)


def test_kv_stays_below_the_ceiling(ledger: Ledger) -> None:
    owner = join(ledger, "chat", ceiling=10)
    assert not owner.try_reserve(Kind.KV, 11)
    assert owner.reserve_up_to(Kind.KV, 11) == 10
    assert owner.try_reserve(Kind.WEIGHTS, 11)


def test_wrong_amounts_change_nothing(owner: Owner) -> None:
    assert owner.try_reserve(Kind.KV, 2)
    with pytest.raises(ValueError):
        owner.release(Kind.KV, 3)
    with pytest.raises(ValueError):
        owner.release(Kind.WEIGHTS, 1)
    for wrong in (owner.try_reserve, owner.release):
        with pytest.raises(ValueError):
            wrong(Kind.KV, -1)
    with pytest.raises(ValueError):
        owner.set_quota(5, 4)
    assert owner.try_reserve(Kind.KV, 0)
    assert owner.held(Kind.KV) == 2


def test_a_full_ledger_names_a_remedy(ledger: Ledger) -> None:
    owners = [join(ledger, f"model{i}") for i in range(NUM_SLOTS)]
    with pytest.raises(LedgerError, match="stop a model"):
        join(ledger, "one-more")
    owners[7].leave()
    assert join(ledger, "one-more").slot == 7


def test_names_and_bells_have_bounds(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="shorter model name"):
        join(ledger, "ä" * 33)
    with pytest.raises(LedgerError, match="shorter run_dir"):
        join(ledger, "chat", bell="x" * 108)
    assert join(ledger, "ä" * 32, bell="x" * 107).view.name == "ä" * 32


def test_leaving_with_something_held_keeps_it_counted(ledger: Ledger) -> None:
    owner = join(ledger, "chat")
    assert owner.try_reserve(Kind.KV, 5)
    owner.leave()
    assert ledger.totals().returning == 5
    with pytest.raises(LedgerError, match="not ours"):
        owner.try_reserve(Kind.KV, 1)
    assert ledger.reap(None) == 5
    assert ledger.owners() == []


def test_activity_keeps_the_moment_when_idleness_began(owner: Owner) -> None:
    owner.set_activity(True, 3, 100)
    assert (owner.view.busy, owner.view.wanted) == (True, 3)
    owner.set_activity(False, 0, 200)
    owner.set_activity(False, 0, 300)
    assert (owner.view.busy, owner.view.wanted, owner.view.idle_since_ns) == (False, 0, 200)


# ---------------------------------------------------------------- death


def test_a_killed_owner_returns_its_granules_once(
    ledger: Ledger, owner: Owner, process: LedgerProcess
) -> None:
    assert process.ask(do="grow", num_pages=9)
    assert process.ask(do="reserve", granules=30)
    assert ledger.totals().leased == 40
    process.kill()
    totals = ledger.totals()
    assert (totals.leased, totals.returning, totals.free) == (0, 40, 60)
    assert [view.alive for view in ledger.owners()] == [True, False]
    assert not owner.try_reserve(Kind.WEIGHTS, 61)
    assert ledger.reap(None) == 40
    assert ledger.reap(None) == 0
    assert owner.try_reserve(Kind.WEIGHTS, 100)


def test_dead_granules_wait_until_the_device_shows_them(
    ledger: Ledger, process: LedgerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process.ask(do="reserve", granules=40)
    process.kill()
    assert ledger.reap(60) == 0
    assert ledger.reap(99) == 0  # some of it may be what the living have leased and not filled yet
    assert ledger.totals().returning == 40
    monkeypatch.setattr("prism_sgl.allocator.ledger.DRIVER_RETURNS_S", 0.0)
    assert ledger.reap(60) == 0
    assert ledger.reap(99) == 39  # somebody else holds one: the others are no less free for that
    assert (ledger.totals().returning, ledger.totals().free) == (1, 99)
    ledger.check()
    assert ledger.reap(99) == 0
    assert ledger.reap(100) == 1
    assert ledger.owners() == []


def test_a_dead_owner_that_held_nothing_frees_its_slot(ledger: Ledger, process: LedgerProcess) -> None:
    (view,) = ledger.owners()
    process.kill()
    owner = join(ledger, "next")
    assert (owner.slot, owner.view.epoch) == (view.slot, view.epoch + 1)


@pytest.mark.parametrize("do", ["reserve", "release"])
def test_death_inside_the_lock_drops_it(
    ledger: Ledger, owner: Owner, process: LedgerProcess, do: str
) -> None:
    assert process.ask(do="reserve", granules=10)
    assert process.ask(do="arm", name="in_lock")
    assert process.ask(do=do, granules=10) == {"stopped": "in_lock"}
    waiting = threading.Thread(target=owner.try_reserve, args=(Kind.KV, 1))
    waiting.start()
    assert waiting.is_alive()
    process.kill()
    waiting.join(timeout=60)
    assert owner.held(Kind.KV) == 1
    assert ledger.reap(None) == 10


def test_a_reaper_killed_in_the_act_leaves_the_rest_to_the_next(ledger: Ledger) -> None:
    dead = join(ledger, "dead")
    assert dead.try_reserve(Kind.KV, 5)
    dead.leave()

    def die(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crash_points, "crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            ledger.reap(None)
    assert ledger.reap(None) == 5


# ---------------------------------------------------------------- forks and threads


def test_a_forked_child_opens_the_ledger_again_and_owns_nothing(ledger: Ledger, owner: Owner) -> None:
    assert owner.try_reserve(Kind.KV, 5)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            assert ledger.totals().leased == 5
            try:
                owner.try_reserve(Kind.KV, 1)
            except LedgerError:
                own = ledger.join("child", floor=0, ceiling=9, priority=0, bell="")
                assert own.try_reserve(Kind.KV, 3)
                assert [view.alive for view in ledger.owners()] == [True, True]
                os.write(write, b"good")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 4) == b"good"
    os.close(read)
    os.waitpid(child, 0)
    totals = ledger.totals()
    assert (totals.leased, totals.returning) == (5, 3)
    assert ledger.reap(None) == 3
    assert owner.try_reserve(Kind.KV, 1)


def test_a_forked_child_does_not_keep_its_parent_alive(ledger: Ledger) -> None:
    """The child inherits descriptors and maps; a lock that lived in them would outlive the owner."""
    code = f"""
import os, sys
from prism_sgl.allocator.ledger import Kind, Ledger
owner = Ledger.open({ledger.path!r}).join("parent", floor=0, ceiling=9, priority=0, bell="")
owner.try_reserve(Kind.KV, 4)
child = os.fork()
if child == 0:
    print("forked", os.getpid(), flush=True)
    sys.stdin.read()
os.waitpid(child, 0)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin
    assert parent.stdout
    pid = int(parent.stdout.readline().split()[1])
    assert ledger.totals().leased == 4
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    os.kill(pid, 0)  # the child lives
    assert ledger.totals().returning == 4
    parent.stdin.close()
    parent.stdout.close()


def test_threads_share_the_lock(ledger: Ledger) -> None:
    owners = [join(ledger, f"model{i}") for i in range(4)]
    over = []

    def work(owner: Owner) -> None:
        for _ in range(200):
            if owner.try_reserve(Kind.KV, 40):
                if ledger.totals().leased > BUDGET:
                    over.append(owner)
                owner.release(Kind.KV, 40)

    threads = [threading.Thread(target=work, args=(owner,)) for owner in owners for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not over
    assert ledger.totals().leased == 0
