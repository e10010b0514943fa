"""benchmarks/controller.py drives the real Controller as its peers do: nothing is refused, some models sleep."""

from __future__ import annotations

import pytest

from benchmarks import controller


@pytest.fixture(scope="module")
def drive() -> controller.Drive:
    drive = controller.Drive(10, 3)
    drive.start()
    drive.run(lambda: drive.num_answered >= 500)
    return drive


def test_requests_are_answered_and_the_controller_stays_whole(drive: controller.Drive) -> None:
    drive.controller.check()
    status = drive.controller.status(drive.now)
    assert sum(model.in_flight + model.queued for model in status.models) < 60
    assert not [model.name for model in status.models if model.reason.startswith("silent")]


def test_mix_of_events_has_requests_beats_sleeps_and_wakes(drive: controller.Drive) -> None:
    assert drive.times_us is not None
    counts = {kind: len(times) for kind, times in drive.times_us.items()}
    assert 500 <= counts["finished"] <= counts["first token"] <= counts["started"] <= counts["submit"]
    assert counts["load"] > 1000 and counts["api beat"] > 100
    assert 10 <= counts["hello"] < 20  # some move where there is room
    assert counts["slept"] > 0 and counts["woke"] > 0


def test_measures_have_what_the_result_needs() -> None:
    found = controller.events(10, 3, 2000, least_s=1.0)
    assert found["events"] == 2000
    assert 0.0 < found["median_us"] <= found["p99_us"] <= found["slowest_ms"] * 1000
    assert controller.placements(10, 3)["median_s"] > 0.0
    assert controller.balance_pass(10, 3)["median_s"] > 0.0
