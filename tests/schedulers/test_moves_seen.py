from __future__ import annotations

import math

from prism_sgl.messages import RuntimeId, Sleep, StartRuntime, StopRuntime
from prism_sgl.schedulers.replay.moves_seen import MovesSeen


def start(model: str, device: str) -> StartRuntime:
    return StartRuntime(runtime=RuntimeId(f"{model}@{device}.1"), model=model, device=device)


def stop(model: str, device: str) -> StopRuntime:
    return StopRuntime(runtime=RuntimeId(f"{model}@{device}.1"), reason="moved")


def test_move_lasts_from_the_start_of_the_target_to_the_end_of_the_source() -> None:
    seen = MovesSeen()
    seen.saw(start("a", "gpu0"), 1.0)
    seen.saw(start("b", "gpu0"), 1.0)
    seen.saw(start("a", "gpu1"), 50.0)
    seen.saw(Sleep(runtime=RuntimeId("b@gpu0.1")), 55.0)
    seen.saw(stop("a", "gpu0"), 62.0)
    (move,) = seen.since(40.0)
    assert (move.model, move.began_at, move.ended_at) == ("a", 10.0, 22.0)
    assert seen.since(70.0) == []


def test_first_start_and_a_restart_are_no_moves_and_one_may_not_be_over() -> None:
    seen = MovesSeen()
    seen.saw(start("a", "gpu0"), 1.0)
    seen.saw(stop("a", "gpu0"), 2.0)
    seen.saw(start("a", "gpu1"), 3.0)
    assert seen.moves == []
    seen.saw(start("a", "gpu2"), 4.0)
    seen.saw(start("a", "gpu3"), 5.0)
    seen.saw(stop("a", "gpu1"), 6.0)  # two still serve
    (move,) = seen.since(0.0)
    assert (move.began_at, move.ended_at) == (4.0, math.inf)
