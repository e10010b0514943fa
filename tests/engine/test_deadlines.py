"""Deadlines on their way into SGLang's waiting queue, with SGLang's own messages, requests and policy; no engine."""

from __future__ import annotations

import pickle
import time
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from prism_sgl.engine import deadlines
from prism_sgl.messages import Due


def due(in_s: float, *, needed_s: float = 0.1, priority: int = 0, waited_s: float = 0.0) -> Due:
    return Due(in_s=in_s, waited_s=waited_s, priority=priority, needed_s=needed_s)


def tokenized(obj: Any, promised: Due | None) -> Any:
    """What TokenizerManager sends to its scheduler, after the way between the processes."""
    obj.normalize_batch_and_arguments()
    manager: Any = SimpleNamespace(
        preferred_sampling_params=None,
        sampling_params_class=SamplingParams,
        tokenizer=None,
        model_config=SimpleNamespace(vocab_size=100),
        server_args=SimpleNamespace(disaggregation_transfer_backend="none"),
        rid_to_state={obj.rid: SimpleNamespace(time_stats=APIServerReqTimeStats())},
    )
    with deadlines.promise(promised):
        made = TokenizerManager._create_tokenized_object(manager, obj, "", [1, 2, 3])
        deadlines.attach(made, manager, obj, "", [1, 2, 3])
    made.wrap_pickle_fields()
    arrived = pickle.loads(pickle.dumps(made))
    arrived.unwrap_pickle_fields()
    return arrived


def request(rid: str, promised: Due | None, *, entered_s_ago: float = 0.0, **sampling: Any) -> Req:
    params = {"max_new_tokens": 4, **sampling}
    message = tokenized(GenerateReqInput(input_ids=[1, 2, 3], rid=rid, sampling_params=params), promised)
    made = Req(message.rid, "", array("q", message.input_ids), message.sampling_params)
    made.time_stats.wait_queue_entry_time = time.perf_counter() - entered_s_ago
    return made


def policy(name: str = "fcfs", *, priorities: bool = False) -> SchedulePolicy:
    return SchedulePolicy(name, RadixCache.create_simulated(), False, priorities, False)


def ordered(waiting: Sequence[Req], by: SchedulePolicy | None = None) -> list[str]:
    queue = list(waiting)
    deadlines.calc_priority(SchedulePolicy.calc_priority, by or policy(), queue, None)
    return [str(entry.rid) for entry in queue]


def test_the_most_go_in_time_and_hopeless_ones_last() -> None:
    waiting = [
        request("hopeless", due(-1.0)),
        request("long", due(2.0, needed_s=1.9)),
        request("third", due(3.0)),
        request("first", due(0.3)),
        request("second", due(0.5)),
    ]
    # With "long" among them two others would be late; of late ones, those that came first go first.
    assert ordered(waiting)[:3] == ["first", "second", "third"]


def test_a_bigger_priority_of_the_router_goes_first() -> None:
    waiting = [request("usual", due(0.2)), request("flex", due(0.1), max_new_tokens=2)]
    waiting.append(request("paid", due(5.0, priority=1)))
    assert ordered(waiting)[0] == "paid"


def test_priorities_of_sglang_count_where_its_user_has_enabled_them() -> None:
    waiting = [request("a", due(0.2, priority=3)), request("b", due(5.0))]
    waiting[0].priority, waiting[1].priority = 0, 1
    assert ordered(waiting, policy(priorities=True)) == ["b", "a"]


def test_without_deadlines_sglangs_order_stays() -> None:
    waiting = [request(rid, None, entered_s_ago=age) for rid, age in (("a", 1.0), ("b", 30.0), ("c", 20.0))]
    assert ordered(waiting) == ["a", "b", "c"]


def test_those_without_a_deadline_keep_sglangs_order_among_themselves() -> None:
    waiting = [
        request("x", None),
        request("late", due(1.0)),
        request("y", None, entered_s_ago=9.0),
        request("soon", due(0.5)),
    ]
    assert ordered(waiting) == ["soon", "late", "x", "y"]


def test_those_without_a_deadline_do_not_starve() -> None:
    """Urgent ones keep coming; one runs each time. Aged, it waits for three others at most."""
    by = policy()
    forgotten = request("forgotten", None, entered_s_ago=deadlines.MAX_WAIT_S + 1.0)
    waiting, ran = [forgotten], []
    for number in range(20):
        waiting += [request(f"u{number}-{copy}", due(5.0, priority=1)) for copy in range(2)]
        deadlines.calc_priority(SchedulePolicy.calc_priority, by, waiting, None)
        ran.append(waiting.pop(0).rid)
    assert "forgotten" in ran[:4]


def test_a_request_that_aged_in_the_router_goes_in_its_turn() -> None:
    waiting = [request(f"u{n}", due(5.0)) for n in range(6)]
    waiting.append(request("aged", due(-5.0, waited_s=deadlines.MAX_WAIT_S + 1.0)))
    assert ordered(waiting).index("aged") <= 3


def test_fcfs_is_what_sglang_does_unless_told_otherwise() -> None:
    assert ServerArgs.__dataclass_fields__["schedule_policy"].default == "fcfs"


def test_another_policy_that_the_user_chose_keeps_its_order() -> None:
    waiting = [request("short", due(0.1), max_new_tokens=1), request("long", due(9.0), max_new_tokens=9)]
    assert ordered(waiting, policy("lof")) == ["long", "short"]


def test_a_retracted_request_is_no_longer_held_to_its_deadline() -> None:
    retracted = request("retracted", due(-30.0))
    retracted.output_ids.append(7)
    assert ordered([retracted, request("b", due(1.0))]) == ["b", "retracted"]


def test_nothing_of_ours_stays_in_the_parameters() -> None:
    plain = request("a", due(1.0))
    theirs = request("b", due(1.0), custom_params={"theirs": 1})
    assert "prism_due" in (plain.sampling_params.custom_params or {})
    ordered([plain, theirs])
    assert plain.sampling_params.custom_params is None
    assert {**theirs.sampling_params.custom_params, "__req__": 0} == {"theirs": 1, "__req__": 0}
    assert ordered([plain, theirs])  # told once, known for ever


@pytest.mark.parametrize("promised", [None, due(9.0)])
def test_a_client_cannot_make_a_deadline_of_its_own(promised: Due | None) -> None:
    forged = request("forged", promised, custom_params={"prism_due": [0.0, 0.0, 99, 0.0]})
    assert ordered([request("b", due(1.0)), forged]) == ["b", "forged"]


def test_embeddings_carry_it_too() -> None:
    message = tokenized(EmbeddingReqInput(input_ids=[1, 2, 3], rid="e"), due(1.0))
    made = Req(message.rid, "", array("q", message.input_ids), message.sampling_params)
    ordered([made])
    assert made.prism_promise.deadline == pytest.approx(time.monotonic() + 1.0, abs=0.5)
