"""Budgets against the cards of the machine, which a list stands in for."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from prism_sgl.config import load
from prism_sgl.errors import EXIT_CONFIG, EXIT_OK, ConfigError
from prism_sgl.launch import nvml
from prism_sgl.launch.__main__ import main
from prism_sgl.launch.cards import check_cards
from prism_sgl.launch.nvml import Card, Holder, NoDriverError
from prism_sgl.launch.supervisor import Programs, run
from tests.launch.instance import free_port
from tests.model_folders import write_model

GIB = 1 << 30
PYTHON, XORG = Holder(pid=485, name="python3", used_bytes=59 * GIB), Holder(pid=7, name="", used_bytes=0)


def card(index: int, free: int = 80, name: str = "NVIDIA H100", holders: tuple[Holder, ...] = ()) -> Card:
    uuid = f"GPU-{index}f9a37c0-0000-0000-0000-000000000000"
    return Card(index, uuid, name, total_bytes=80 * GIB, free_bytes=free * GIB, holders=holders)


def no_driver() -> Sequence[Card]:
    raise NoDriverError("NVML Shared Library Not Found")


def write(folder: Path, *devices: tuple[int, str], port: int = 30000) -> Path:
    """A models.toml with a device gpuN for each (index, memory)."""
    model = folder / "m"
    if not model.exists():
        write_model(model, weights_bytes=2, layers=1, kv_heads=1, head_dim=2, context=2)
    tables = [
        f'[[devices]]\nname = "gpu{n}"\nkind = "cuda"\nindex = {index}\nmemory = "{memory}"\n'
        for n, (index, memory) in enumerate(devices)
    ]
    file = folder / "models.toml"
    head = f'[server]\nport = {port}\nrun_dir = "{folder}/run"\n'
    file.write_text(head + "".join(tables) + f'[models.chat]\npath = "{model}"\n')
    return file


def notes(
    file: Path,
    *cards: Card,
    visible: str = "",
    order: str = "",
    read: Callable[[], Sequence[Card]] | None = None,
) -> list[str]:
    environment = {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}
    return check_cards(load(file), environment, read or (lambda: cards), is_here=True)


def refusal(file: Path, *cards: Card, visible: str = "", order: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        notes(file, *cards, visible=visible, order=order)
    assert caught.value.exit_code == EXIT_CONFIG
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    return message.removeprefix(f"{file}: ")


def test_budgets_that_the_cards_have_say_nothing(tmp_path: Path) -> None:
    assert notes(write(tmp_path, (0, "80GiB"), (1, "40GiB")), card(0), card(1)) == []


def test_budget_beyond_the_card_is_refused_by_name_and_numbers(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, (1, "4000GiB")), card(0), card(1)) == (
        "devices.gpu0.memory is 4000GiB, more than there is on card 1 (NVIDIA H100, 80GiB); "
        'give at most "80GiB"'
    )


def test_device_without_a_card_is_told_which_there_are(tmp_path: Path) -> None:
    file = write(tmp_path, (0, "40GiB"), (2, "40GiB"))
    assert refusal(file, card(0), card(1)) == (
        "devices.gpu1.index is 2, but the cards are 0 (NVIDIA H100, 80GiB), 1 (NVIDIA H100, 80GiB); "
        "give the index of a card"
    )
    assert refusal(file) == "devices.gpu0.index is 0, but there is no card; give the index of a card"


def test_memory_that_others_hold_is_a_warning_with_who_they_are(tmp_path: Path) -> None:
    file = write(tmp_path, (0, "70GiB"))
    assert notes(file, card(0, free=20, holders=(PYTHON, XORG))) == [
        "devices.gpu0.memory: of the 70GiB only 20GiB are free now on card 0 (NVIDIA H100, 80GiB); "
        "held by python3 (pid 485, 59GiB), a process (pid 7); engines wait for the rest"
    ]
    assert "held by processes that the driver does not name" in notes(file, card(0, free=20))[0]
    assert notes(write(tmp_path, (0, "20GiB")), card(0, free=20, holders=(PYTHON,))) == []


@pytest.mark.parametrize("visible", ["0,0", "0, GPU-0F9A"])
def test_two_devices_on_one_card_share_what_it_has(tmp_path: Path, visible: str) -> None:
    file = write(tmp_path, (0, "50GiB"), (1, "40GiB"))
    assert refusal(file, card(0), card(1), visible=visible) == (
        "devices.gpu0.memory and devices.gpu1.memory are 50GiB + 40GiB, together more than there is on "
        "card 0 (NVIDIA H100, 80GiB), which all of them name; give each device a card of its own, or less memory"
    )
    file = write(tmp_path, (0, "40GiB"), (1, "30GiB"))
    assert notes(file, card(0), card(1), visible=visible) == []
    assert "of the 70GiB only 60GiB" in notes(file, card(0, free=60), card(1), visible=visible)[0]


def test_index_counts_within_what_the_user_made_visible(tmp_path: Path) -> None:
    file = write(tmp_path, (1, "40GiB"))
    cards = card(0), card(1), card(2, free=1)
    assert "free now on card 2" in notes(file, *cards, visible="0,2")[0]
    assert "free now on card 2" in notes(file, *cards, visible="0,GPU-2f9a37c0")[0]
    assert refusal(file, *cards, visible="0") == (
        "devices.gpu0.index is 1, but CUDA_VISIBLE_DEVICES is 0; count within those, from 0"
    )
    assert refusal(file, card(0), visible="0,4") == (
        'devices.gpu0.index is 1, that is "4" in CUDA_VISIBLE_DEVICES, but the cards are '
        "0 (NVIDIA H100, 80GiB); correct CUDA_VISIBLE_DEVICES"
    )
    assert 'is 1, that is "" in' in refusal(file, card(0), visible="0,")
    assert 'that is "GPU-" in' in refusal(file, *cards, visible="0,GPU-"), "more than one begins so"


def test_no_card_is_guessed_at(tmp_path: Path) -> None:
    file = write(tmp_path, (0, "4000GiB"))
    assert notes(file, card(0), visible="MIG-1") == [
        "devices.gpu0.memory is not compared with its card: MIG-1 is a part of one"
    ]
    mixed = card(0), card(1, name="NVIDIA L4")
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in notes(file, *mixed, visible="1,0")[0]
    assert "card 1 (NVIDIA L4" in refusal(file, *mixed, visible="1,0", order="PCI_BUS_ID")
    assert "card 0 (NVIDIA H100" in refusal(file, *mixed), (
        "we set the order where the user has made no choice"
    )


def test_without_a_driver_serving_is_refused_and_checking_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, (0, "40GiB"), port=free_port())
    silence = "the NVIDIA driver's library (NVML) does not answer: NVML Shared Library Not Found"
    assert main(["--config", str(file)], read_cards=no_driver) == EXIT_CONFIG
    assert capsys.readouterr().err == (
        f'{file}: devices.gpu0.kind is "cuda", but {silence}; '
        'install the driver, start the container with its GPUs, or give kind = "host"\n'
    )
    assert main(["--config", str(file), "--check"], read_cards=no_driver) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"note: budgets are not compared with cards: {silence}"
    assert lines[1].startswith(f"{file} is right: chat at ")
    assert main(["--config", str(file), "--check"], read_cards=lambda: []) == EXIT_OK
    assert "cards: this machine has none\n" in capsys.readouterr().out


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_too_large_a_budget_ends_a_start_and_a_check_with_78(
    tmp_path: Path, check: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, (0, "81GiB"), port=free_port())
    assert main(["--config", str(file), *check], read_cards=lambda: [card(0)]) == EXIT_CONFIG
    assert "devices.gpu0.memory is 81GiB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_host_device_asks_no_driver(tmp_path: Path) -> None:
    file = write(tmp_path, (0, "40GiB"))
    file.write_text(file.read_text().replace("cuda", "host"))
    assert notes(file, read=no_driver) == []


class _EndsWhenServing(io.StringIO):
    """Asks this process to stop, as a user would, once all is started."""

    def write(self, text: str) -> int:
        if "prism_sgl serves" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_a_start_warns_of_memory_that_others_hold_and_goes_on(tmp_path: Path) -> None:
    file = write(tmp_path, (0, "70GiB"), port=free_port())
    tiny = "tests.launch.programs.tiny_"
    programs, out = Programs(f"{tiny}router", f"{tiny}api_server", f"{tiny}standby"), _EndsWhenServing()
    cards = [card(0, free=20, holders=(PYTHON,))]
    assert run(load(file), programs=programs, out=out, read_cards=lambda: cards) == EXIT_OK
    lines = [line.split("] ", 1)[1] for line in out.getvalue().splitlines()]
    assert lines[0].startswith("warning: devices.gpu0.memory: of the 70GiB only 20GiB are free now")
    assert lines[1] == "prism_sgl serves chat on gpu0 (cuda, 70GiB)"


class _Error(Exception):
    pass


class _NoPermissionError(_Error):
    pass


def driver(*, without: str = "") -> SimpleNamespace:
    """pynvml on a machine of two cards, the first of which is another container's. ``without``: this call fails."""

    def handle(number: int) -> str:
        if number == 0:
            raise _NoPermissionError
        return "handle"

    def name_of(pid: int) -> str:
        if pid != PYTHON.pid:
            raise _Error("not found")
        return PYTHON.name

    def fail(*_: object, **__: object) -> None:
        raise _Error(f"{without} failed")

    calls: dict[str, Callable[..., object]] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetMemoryInfo": lambda _, version: SimpleNamespace(total=81, reserved=1, free=21),
        "nvmlDeviceGetUUID": lambda _: "GPU-1",
        "nvmlDeviceGetName": lambda _: "NVIDIA H100",
        "nvmlDeviceGetComputeRunningProcesses": lambda _: [
            SimpleNamespace(pid=XORG.pid, usedGpuMemory=None),
            SimpleNamespace(pid=PYTHON.pid, usedGpuMemory=PYTHON.used_bytes),
        ],
        "nvmlDeviceGetGraphicsRunningProcesses": lambda _: [
            SimpleNamespace(pid=XORG.pid, usedGpuMemory=None)
        ],
        "nvmlSystemGetProcessName": name_of,
    }
    if without:
        calls[without] = fail
    errors = {
        "NVMLError": _Error,
        "NVMLError_NoPermission": _NoPermissionError,
        "NVMLError_GpuIsLost": _NoPermissionError,
    }
    return SimpleNamespace(**calls, **errors, nvmlMemory_v2=2)


def test_the_driver_is_asked_for_the_cards_that_we_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    only = Card(0, "GPU-1", "NVIDIA H100", total_bytes=80, free_bytes=21, holders=(PYTHON, XORG))
    assert nvml.read_cards() == [only]
    monkeypatch.setitem(sys.modules, "pynvml", driver(without="nvmlDeviceGetComputeRunningProcesses"))
    assert nvml.read_cards() == [dataclasses.replace(only, holders=(XORG,))]


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_fails_is_none(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver(without=call))
    with pytest.raises(NoDriverError, match=f"{call} failed"):
        nvml.read_cards()
