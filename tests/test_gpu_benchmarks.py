"""What the GPU benchmarks stand on, without a card: statistics, results, and children with a stand-in engine."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from benchmarks.gpu import cores
from benchmarks.gpu.card import Card, Neighbour
from benchmarks.gpu.children import Action, Child, ChildError, Engine
from benchmarks.gpu.engine_process import Ask, EngineHandler, EngineLike, Handler, random_ids
from benchmarks.gpu.nvml import GIB, MIB, CardInfo
from benchmarks.gpu.results import RESULTS, Results, result_path
from benchmarks.gpu.session import OutOfTimeError, bounded
from benchmarks.gpu.stats import Ratio, mean, percentile, quantile, ratio_of_requests, ratio_of_rounds
from prism_sgl.allocator.ledger import Kind, Ledger
from prism_sgl.messages import RuntimeState
from prism_sgl.units import GRANULE_BYTES

HANDLER = "tests.test_gpu_benchmarks:StandInHandler"
WEIGHTS = 100  # granules of a stand-in


class StandInEngine:
    """Speaks like sglang.Engine: token n of an answer is the prompt's length + n."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    async def async_generate(
        self, input_ids: list[int], sampling_params: dict[str, Any], stream: bool, **logprobs: Any
    ) -> Any:
        assert sampling_params["ignore_eos"] and sampling_params["temperature"] == 0
        if logprobs:
            assert not stream
            return {"meta_info": self._logprobs(input_ids, **logprobs)}
        assert stream

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            for number in range(sampling_params["max_new_tokens"]):
                if len(input_ids) == 13:
                    raise ValueError("unlucky")
                await asyncio.sleep(0)
                yield {"output_ids": [len(input_ids) + number], "meta_info": {"cached_tokens": 2}}

        return chunks()

    def _logprobs(
        self, ids: list[int], return_logprob: bool, logprob_start_len: int, top_logprobs_num: int
    ) -> dict[str, Any]:
        """As SGLang tells them. The likeliest token comes after its elder; one that is n away is n less likely."""
        assert return_logprob and top_logprobs_num == 1
        pairs = list(zip(ids[logprob_start_len:], ids[logprob_start_len + 1 :], strict=False))
        return {
            "input_token_logprobs": [
                (None, ids[logprob_start_len], None),
                *((-1.0 - abs(token - elder - 1), token, None) for elder, token in pairs),
            ],
            "input_top_logprobs": [None, *([(-1.0, elder + 1, None)] for elder, _ in pairs)],
        }

    def collective_rpc(self, method: str, **kwargs: Any) -> None:
        assert method != "unknown", "no such method"
        print(f"rpc {method} {kwargs}", flush=True)

    def release_memory_occupation(self) -> None:
        print("released", flush=True)

    def resume_memory_occupation(self) -> None:
        print("resumed", flush=True)

    def flush_cache(self) -> None:
        print("flushed", flush=True)

    def shutdown(self) -> None:
        print("shut down", flush=True)


class StandInRuntime(StandInEngine):
    """One of ours: a real owner in a real ledger, whose memory is imaginary. Answers targets in a thread."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self._owner = Ledger.open(spec["ledger_path"]).join(
            spec["runtime"],
            floor=0,
            ceiling=spec["ceiling_bytes"] // GRANULE_BYTES or 1 << 20,
            priority=0,
            bell="",
        )
        self._lock = threading.Lock()
        assert self._owner.try_reserve(Kind.WEIGHTS, WEIGHTS)
        self._owner.set_state(RuntimeState.AWAKE)
        self._owner.set_activity(False, 0, time.monotonic_ns())
        print("image memory: 256 MiB made in 0.40 s, page-locked in 0.30 s")
        print("m: 7 storages, 200.0 MiB, in the arena in 0.1 s, image in 0.50 s, page-locked in 0.25 s")
        threading.Thread(target=self._answer, daemon=True).start()

    async def async_generate(
        self, input_ids: list[int], sampling_params: dict[str, Any], stream: bool, **logprobs: Any
    ) -> Any:
        with self._lock:
            self._owner.reserve_up_to(Kind.KV, 1 << 20)
        print(f"Prefill batch, #new-seq: 1, #new-token: {len(input_ids)}, #cached-token: 0", flush=True)
        return await super().async_generate(input_ids, sampling_params, stream, **logprobs)

    def collective_rpc(self, method: str, **kwargs: Any) -> None:
        super().collective_rpc(method, **kwargs)
        with self._lock:
            owner = self._owner
            if method == "prism_sleep":
                owner.release(Kind.KV, owner.held(Kind.KV))
                if not kwargs["keep_weights"]:
                    owner.release(Kind.WEIGHTS, owner.held(Kind.WEIGHTS))
                owner.set_state(RuntimeState.ASLEEP)
                print(
                    "sleep: gave back 9 MiB in 0.1 s; beside pages 700 MiB, 160 of them torch's", flush=True
                )
            elif method == "prism_wake":
                assert owner.try_reserve(Kind.WEIGHTS, WEIGHTS - owner.held(Kind.WEIGHTS))
                owner.set_state(RuntimeState.AWAKE)
                print("wake: 200 MiB of weights mapped in 0.0012 s, 2 MiB of KV in 0.0001 s, waited")
                print("wake: all weights are there after 0.004 s", flush=True)
            elif method == "prism_grow":
                owner.post_targets(kwargs["size_bytes"] // GRANULE_BYTES, 0.25)
                deadline = time.monotonic() + 5.0
                while not owner.try_reserve(Kind.KV, kwargs["size_bytes"] // GRANULE_BYTES):
                    assert time.monotonic() < deadline
                print("grow: 8192 MiB more after 12.34 ms, turns at 0.0", flush=True)

    def _answer(self) -> None:
        while True:
            time.sleep(0.001)
            target = self._owner.target()
            if target is None:
                continue
            with self._lock:
                for kind in (Kind.KV, Kind.WEIGHTS) if self._owner.view.is_asleep else (Kind.KV,):
                    excess = self._owner.view.elastic - target.granules
                    given = min(max(excess, 0), self._owner.held(kind))
                    self._owner.release(kind, given)
                    print(
                        f"reclaim: gave {given * 2} MiB back to neighbours in 3.0 ms (chosen after 1.2, "
                        "unmapped after 2.5), lost 9 cached tokens, keeps 2 MiB of KV",
                        flush=True,
                    )
                self._owner.answer_target(target.seq)


class StandInHandler(EngineHandler):
    def do_prepare(self, kind: str, device_kind: str = "cuda") -> float:
        return 0.0

    def build(self, kind: str, args: dict[str, Any], spec: dict[str, Any] | None) -> EngineLike:
        if kind == "broken":
            raise RuntimeError("no such model")
        return cast(EngineLike, StandInRuntime(spec) if spec else StandInEngine())

    def do_die(self) -> None:
        os._exit(7)

    def do_hang(self) -> None:
        time.sleep(60)


class StandInCard(Handler):
    def do_context(self, small_stacks: bool = False) -> list[int]:
        return [os.getpid()]

    def do_hold(self, size_bytes: int) -> None: ...

    def do_link(self) -> list[float]:
        return [5e10, 5.2e10, 5.1e10]

    def do_churn(self, page_bytes: int, total_bytes: int, seconds: float) -> dict[str, float]:
        time.sleep(seconds)
        return {"cycles": 3, "seconds": seconds}

    def do_allocate(self, total_bytes: int, seconds: float) -> dict[str, float]:
        return self.do_churn(0, total_bytes, seconds)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("benchmarks.gpu.children.ENGINE", HANDLER)
    engine = Engine("stock", "stand-in", tmp_path / "engine.log")
    engine.send("prepare", kind="stock")
    engine.send("start", kind="stock", args={}, spec=None)
    engine.wait(30)
    yield engine
    engine.close()
    assert engine.process.returncode is not None


# ---------------------------------------------------------------- statistics


def test_percentile_is_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([1.0, 2.0], 1.0) == 2.0
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError):
        percentile([], 0.5)


def test_equal_rounds_have_an_interval_of_no_width() -> None:
    ratio = ratio_of_rounds([[2.0], [4.0], [8.0]], [[1.0], [2.0], [4.0]], mean)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_interval_of_noisy_rounds_covers_the_truth_and_is_repeatable() -> None:
    """95 of 100 would be the promise; seven rounds are few, so somewhat less is expected of the bootstrap."""
    dice = random.Random(3)
    covered = 0
    for _ in range(40):
        moods = [[dice.uniform(50, 150)] for _ in range(7)]
        ours = [[mood * 0.99 * math.exp(dice.gauss(0, 0.01))] for (mood,) in moods]
        ratio = ratio_of_rounds(ours, moods, mean)
        assert ratio == ratio_of_rounds(ours, moods, mean)
        covered += ratio.low <= 0.99 <= ratio.high
    assert covered >= 30


def test_the_worse_end_of_the_interval_decides() -> None:
    ratio = Ratio(1.0, 0.993, 1.004)
    assert not ratio.within(0.005, bigger_is_better=True)
    assert ratio.within(0.005, bigger_is_better=False)


def test_a_quantile_is_of_all_samples_and_resampled_by_rounds() -> None:
    """Two bursts, one slow as a whole: a bootstrap over samples would not see that it may be drawn twice."""
    fast, slow = [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]
    ratio = ratio_of_rounds([fast, slow], [[1.0, 1.0], [1.0, 1.0]], quantile(0.5))
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 1.0, 3.0)


def test_a_ratio_turned_round_keeps_its_ends_in_order() -> None:
    assert Ratio(0.5, 0.25, 2.0).inverse() == Ratio(2.0, 0.5, 4.0)


def test_unequal_numbers_of_rounds_cannot_be_compared() -> None:
    with pytest.raises(ValueError):
        ratio_of_rounds([[1.0]], [], mean)


# ---------------------------------------------------------------- results


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setenv("OUT", str(tmp_path))
    return Results("trial", card="a card", driver="1.2")


def read(results: Results) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(results.path.read_text())
    return content


def test_every_row_is_on_disk_at_once(results: Results, tmp_path: Path) -> None:
    assert results.path == tmp_path / "trial.json"
    results.add("sleep", 0.0201234567, 7.0, "s", target="< 0.05 s", met=True)
    results.add("throughput", 99.0, 100.0, "tokens/s", ratio=Ratio(0.99, 0.98, 1.0))
    content = read(results)
    assert set(content) == {"name", "card", "driver", "date", "command", "rows"}
    assert content["rows"][0] == {
        "what": "sleep",
        "ours": 0.020123,
        "peer": 7.0,
        "unit": "s",
        "ratio": 0.0028748,
        "target": "< 0.05 s",
        "met": True,
    }
    assert content["rows"][1]["interval"] == [0.98, 1.0]


def test_a_row_of_the_same_name_is_replaced(results: Results) -> None:
    for value in (1.0, 2.0):
        results.add("sleep", value, None, "s")
    results.add("wake", 3.0, None, "s")
    assert [(row["what"], row["ours"]) for row in read(results)["rows"]] == [("sleep", 2.0), ("wake", 3.0)]


def test_a_failed_measurement_becomes_a_row_and_the_next_goes_on(results: Results) -> None:
    with results.attempt("wake"):
        raise ChildError("has died")
    results.add("sleep", 1.0, None, "s")
    rows = read(results)["rows"]
    assert rows[0]["note"] == "not run: ChildError: has died"
    assert rows[0]["met"] is None
    assert rows[1]["ours"] == 1.0


def test_without_out_results_stand_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert result_path("wake").parts[-4:] == ("benchmarks", "results", "gpu", "wake.json")


# ---------------------------------------------------------------- requests and children


def test_a_request_has_the_same_ids_everywhere() -> None:
    one, other = Ask(1, 5, 4, prefix_seed=9, prefix_tokens=3), Ask(2, 5, 4, prefix_seed=9, prefix_tokens=3)
    assert one.ids() == one.ids()
    assert one.ids()[:3] == other.ids()[:3] == random_ids(9, 3)
    assert one.ids()[3:] != other.ids()[3:]


def test_burst_is_timed_and_failures_are_counted(engine: Engine) -> None:
    burst = engine.burst([Ask(1, 5, 3), Ask(2, 13, 3), Ask(3, 7, 1)], keep_ids=True)
    assert burst.ids[0] == [5, 6, 7]
    assert len(burst.errors) == 1 and "unlucky" in burst.errors[0]
    assert len(burst.ttfts_s) == 2
    assert len(burst.tpots_s) == 1  # one token alone has no time per token
    assert burst.new_tokens == 4
    assert burst.answers[0]["cached"] == 2


def test_gaps_are_of_the_answers_tokens_alone(engine: Engine) -> None:
    """Against a stand-in with SGLang's offsets. Of a real plain SGLang they were those of transformers (2026-11-29)."""
    ask = Ask(1, 5, 4)
    last = ask.ids()[-1]
    right = [last + 1, last + 2, last + 3]
    assert engine.gaps([ask, ask], [right, [right[0] + 4, *right[1:]]]) == [[0.0] * 3, [4.0, 4.0, 0.0]]
    assert engine.log_matches("(flushed)") == [("flushed",)]


def test_requests_are_sent_at_their_times(engine: Engine) -> None:
    at = time.monotonic() + 0.05
    burst = engine.burst([Ask(1, 5, 1), Ask(2, 5, 1, at_s=0.1)], at=at)
    assert burst.began >= at
    assert burst.wall_s >= 0.1
    assert all(0 <= answer["sent_s"] < 5 for answer in burst.answers)


def test_an_action_comes_amid_requests_once_all_have_begun(engine: Engine) -> None:
    mark = engine.log_mark()
    burst = engine.act_amid({"name": "amid"}, [Ask(1, 5, 3), Ask(2, 6, 4)])
    assert burst.new_tokens == 7 and not burst.errors
    assert engine.log_matches(r"rpc (amid)", mark) == [("amid",)]
    with pytest.raises(ChildError, match="1 requests had no token"):
        engine.act_amid({"name": "amid"}, [Ask(1, 5, 3), Ask(2, 13, 3)])


def test_actions_go_to_the_engine_or_by_rpc(engine: Engine) -> None:
    sleep: Action = {"name": "prism_sleep", "args": {"keep_weights": True}}
    mark = engine.log_mark()
    assert len(engine.act(sleep, times=2)) == 2
    engine.act({"name": "release_memory_occupation"})
    assert engine.log_matches(r"rpc (\w+) (\{.*\})", mark) == [("prism_sleep", "{'keep_weights': True}")] * 2
    assert engine.log_matches("(released)") == [("released",)]
    woken = engine.act_then_generate(sleep, Ask(1, 4, 1))
    assert woken["first_token_s"] >= woken["action_s"] >= 0
    cycles = engine.call("cycle", actions=[sleep, sleep], seconds=0.05)
    assert cycles["cycles"] == len(cycles["times"][1]) >= 1


def test_answers_come_in_the_order_of_the_commands(engine: Engine) -> None:
    engine.send_burst([Ask(1, 5, 2)], keep_ids=True)
    engine.send("ping")
    assert engine.receive_burst().ids == [[5, 6]]
    assert engine.receive() == "pong"
    with pytest.raises(ValueError):
        engine.receive()


def test_a_refused_command_leaves_the_child_usable(engine: Engine) -> None:
    with pytest.raises(ChildError, match="no such method"):
        engine.act({"name": "unknown"})
    assert engine.call("ping") == "pong"


def test_a_dead_child_is_reported_with_its_log(engine: Engine) -> None:
    engine.act({"name": "last_words"})
    with pytest.raises(ChildError, match=r"has died(.|\n)*last_words"):
        engine.call("die")


def test_a_hanging_child_is_given_up_and_killed(engine: Engine) -> None:
    with pytest.raises(ChildError, match="no answer"):
        engine.call("hang", timeout_s=0.1)
    engine.kill()
    assert engine.process.returncode == -signal.SIGKILL


def test_an_engine_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    child = Child("broken", HANDLER, tmp_path / "log")
    try:
        with pytest.raises(ChildError, match="no such model"):
            child.call("start", kind="broken", args={}, spec=None)
    finally:
        child.close()


def test_time_over_stops_everything_but_not_as_an_ordinary_error(results: Results) -> None:
    reached = False
    with bounded(0.05):
        with results.attempt("too long"):
            time.sleep(30)
        reached = True
    assert not reached
    assert not issubclass(OutOfTimeError, Exception)


# ---------------------------------------------------------------- the card's ledger


def test_a_card_has_a_ledger_and_an_image_store() -> None:
    with Card(GIB, device_kind="host") as card:
        assert (card.run_dir / "images.sock").exists()
        neighbour = Neighbour(card)
        assert neighbour.free_bytes() == GIB
        took = neighbour.take(100 * MIB)
        assert took is not None and took < 1
        assert neighbour.free_bytes() == GIB - 100 * MIB
        assert neighbour.take(GIB, timeout_s=0.05) is None
        neighbour.close()
        assert card.ledger.totals().free * 2 * MIB == GIB
    assert not card.run_dir.exists()


def test_flags_of_ours_and_stock_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    def start(_card: Card, kind: str, name: str, args: dict[str, Any], **rest: Any) -> None:
        sent[kind] = (rest.get("spec") or {}).get("engine_args", args)

    monkeypatch.setattr(Card, "_engine", start)
    with Card(GIB) as card:
        card.ours("a", tmp_path, max_total_tokens=100)
        card.stock("b", tmp_path, max_total_tokens=100)
    ours, stock = sent["ours"], sent["stock"]
    assert ours["nccl_port"] != stock["nccl_port"]
    assert stock.pop("model_path") == str(tmp_path)
    assert ours | {"nccl_port": 0} == stock | {"nccl_port": 0}


# ---------------------------------------------------------------- the scripts


@pytest.mark.parametrize(
    ("name", "options", "num_rows"),
    [
        ("wake", ["--cycles", "2"], 41),
        ("overhead", ["--rounds", "2", "--requests", "2"], 29),
        ("residual", [], 33),
        ("share", ["--rounds", "2"], 22),
        ("neighbours", ["--rounds", "2"], 19),
        ("coserve", ["--seconds", "0.5", "--systems", "stock,ours,kvcached"], 9),
        ("stale_bytes", [], 4),
    ],
)
def test_every_script_runs_through(
    name: str, options: list[str], num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for engines and card: device time is too dear for a typing mistake in the last row."""
    script = importlib.import_module(f"benchmarks.gpu.{name}")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr("benchmarks.gpu.children.ENGINE", HANDLER)
    monkeypatch.setattr("benchmarks.gpu.card.CARD", "tests.test_gpu_benchmarks:StandInCard")
    monkeypatch.setattr(script, "ensure_models", lambda *names: [tmp_path for _ in names])
    if name in ("wake", "residual"):  # with all that an H200 has the room for
        monkeypatch.setattr(script, "card_info", lambda: CardInfo("a card", "1.2", 141 * GIB))
    if name == "stale_bytes":
        monkeypatch.setattr(script, "attention_backend", lambda: "fa3")
    # Stand-ins have one process, and there are no roles to bind.
    monkeypatch.setattr(script, "share_cores", lambda engines: None, raising=False)
    monkeypatch.setattr(script, "IDLE_S", 0.0, raising=False)
    for reading in ("card_used_mib", "process_mib"):
        if hasattr(script, reading):
            value = 700.0 if reading == "card_used_mib" else {1: 600.0}
            monkeypatch.setattr(script, reading, lambda *_, value=value: value)
    script.main()
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    failed = [row for row in rows if "not run" in row.get("note", "") and "kvcached" not in row["what"]]
    assert not failed
    assert len(rows) == num_rows, [row["what"] for row in rows]


def test_a_core_is_taken_once_and_never_the_first() -> None:
    threads = {cpu: frozenset((cpu, cpu + 8)) for cpu in range(8)}
    threads |= {cpu + 8: siblings for cpu, siblings in threads.items()}
    assert cores.one_cpu_a_core(threads, 4) == [1, 2, 3, 4]
    assert cores.one_cpu_a_core({cpu: frozenset((cpu,)) for cpu in range(4)}, 4) is None


def test_all_threads_of_a_process_go_to_its_core(engine: Engine) -> None:
    """The stand-in's name is neither the scheduler's nor the detokenizer's, so it counts as the tokenizer."""
    (pid,) = engine.pids
    allowed = os.sched_getaffinity(pid)
    last = max(allowed)
    cores.bind(pid, cores.title(pid), [min(allowed), min(allowed), last, min(allowed)])
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    assert threads and all(os.sched_getaffinity(thread) == {last} for thread in threads)
    assert cores.thread_siblings().keys() == os.sched_getaffinity(0)


@pytest.mark.parametrize(("card", "folder"), [("h200", ""), ("h100", "h100")])
def test_costs_come_from_the_results_as_they_are_written_now(
    card: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed row must not be found out by the next one who wants to replay on a new card's costs."""
    from benchmarks.gpu import costs
    from prism_sgl.launch.replay import measurements

    out = tmp_path / "costs.json"
    results = RESULTS / folder
    monkeypatch.setattr(sys, "argv", ["costs", "--results", str(results), "--out", str(out)])
    costs.main()
    found, shipped = measurements.read(out), measurements.read(measurements.CARDS[card])
    assert found.bytes_per_s == pytest.approx(shipped.bytes_per_s, rel=0.1)
    assert found.asleep_bytes == pytest.approx(shipped.asleep_bytes, rel=0.2)
    monkeypatch.setattr(sys, "argv", ["costs", "--results", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit, match=r"overhead\.json cannot be read"):
        costs.main()


def test_costs_of_two_cards_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import costs

    for name, card in (("overhead", "NVIDIA H200"), ("wake", "NVIDIA H100 80GB HBM3")):
        result = {"card": card, "date": "2026-11-29", "command": name, "rows": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(
        sys, "argv", ["costs", "--results", str(tmp_path), "--out", str(tmp_path / "out.json")]
    )
    with pytest.raises(
        SystemExit, match=r"wake\.json is of one NVIDIA H100 80GB HBM3, the others of one NVIDIA H200"
    ):
        costs.main()
    assert not (tmp_path / "out.json").exists()


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    from benchmarks.gpu import tables

    assert tables.tables() in tables.PAGE.read_text(), "run python -m benchmarks.gpu.tables"


def test_pairs_of_requests_are_drawn_together() -> None:
    """Each of ours is half of its peer, whatever the request: in pairs that is certain, apart it is not."""
    peers = [float(value) for value in range(1, 60)]
    ours = [value / 2 for value in peers]
    paired = ratio_of_requests(ours, peers, mean, paired=True)
    apart = ratio_of_requests(ours, peers[:50], mean, paired=False)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.5, 0.5, 0.5))
    assert apart.low < 0.55 < apart.high


@pytest.mark.parametrize("block_tokens", [1, 16, 64])
def test_steps_of_every_block_size_free_all_that_they_took(block_tokens: int, tmp_path: Path) -> None:
    """As grow.py steps on a card: in SGLang's order of calls, on an allocator that asserts its invariants."""
    from benchmarks.gpu import grow
    from tests.engine.elastic_fixture import make_elastic

    elastic = make_elastic(
        tmp_path, token_bytes=1024, num_tokens=20_000, block_tokens=block_tokens, budget_pages=12
    )
    elastic.grow(elastic.pool.pages.num_pages - 1)
    steps = grow.token_steps if block_tokens == 1 else grow.paged_steps
    steps(elastic.allocator, 300)
    elastic.allocator.check()
    assert elastic.allocator.used_blocks() == 0
    elastic.ledger.close()


class Wisher:
    """A safe point over a real pool, and a scheduler with one request that decodes: what ``prism_grow`` works on."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from prism_sgl.engine.runtime_memory import RuntimeMemory
        from prism_sgl.engine.safe_point import SafePoint
        from tests.engine.elastic_fixture import make_elastic

        self.elastic = make_elastic(
            folder, token_bytes=32 * 1024, num_tokens=1600, block_tokens=1, budget_pages=24
        )
        self.elastic.owner.set_state(RuntimeState.AWAKE)
        self.asked: list[int] = []
        self.neighbour = self.elastic.ledger.join("neighbour", floor=0, ceiling=24, priority=0, bell="")
        memory: Any = SimpleNamespace(
            owner=self.elastic.owner,
            ledger=self.elastic.ledger,
            bell=SimpleNamespace(drain=lambda: None, wait=lambda seconds: None),
            overhead=SimpleNamespace(look=lambda *, in_a_hurry: None),
            arrival=None,
            ask_neighbours=lambda wanted, page=1: self.asked.append(wanted),
            strangers=SimpleNamespace(look=lambda *_, **__: None),
        )
        scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=self.elastic.allocator,
            tree_cache=self.elastic.tree,
            enable_overlap=False,
            chunked_req=None,
            waiting_queue=[],
            max_running_requests=8,
        )
        self.point = memory.safe_point = SafePoint(scheduler, memory)
        monkeypatch.setattr(RuntimeMemory, "_current", memory)

    def turn(self) -> None:
        self.point._tried_at = 0.0  # as if the pause between two tries were over
        request = SimpleNamespace(output_ids=[], sampling_params=SimpleNamespace(max_new_tokens=8))
        running = SimpleNamespace(reqs=[request], batch_is_full=False, is_empty=lambda: False)
        plan = SimpleNamespace(batch_to_run=object())
        self.point.next_batch(lambda scheduler, running_batch, last_batch: plan, running, None)


def test_a_wish_is_asked_for_and_taken_between_decode_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from benchmarks.gpu import scheduler_side, share

    caplog.set_level("INFO")
    wisher = Wisher(tmp_path, monkeypatch)
    wisher.turn()
    usable = wisher.elastic.allocator.usable_tokens()
    assert wisher.neighbour.reserve_up_to(Kind.KV, 1 << 20)
    scheduler_side._grow(None, 6 * 2 * MIB)
    wisher.turn()
    assert wisher.asked == [6]  # granules, and pages of one granule each
    wisher.neighbour.release(Kind.KV, 2)
    wisher.turn()
    assert "grow:" not in caplog.text
    wisher.neighbour.release(Kind.KV, wisher.neighbour.held(Kind.KV))
    wisher.turn()
    assert re.search(share.GREW, caplog.text)
    turns = re.findall(r"mapped (\d+) pages", caplog.text)
    assert [int(pages) for pages in turns] == [0, 2, 4]
    assert wisher.elastic.allocator.usable_tokens() >= usable + 6 * 64
    assert wisher.point._waiting_tokens(SimpleNamespace(reqs=[])) == 0, "the wish is over"
    wisher.elastic.ledger.close()


def test_a_wish_is_for_all_of_it_whatever_could_be_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requester's ended requests are evictable: its safe point would ask for so much less."""
    from benchmarks.gpu import scheduler_side

    wisher = Wisher(tmp_path, monkeypatch)
    wisher.turn()
    elastic = wisher.elastic
    elastic.grow(4)
    elastic.cache(list(range(100)))
    assert elastic.tree.evictable_size() == 100
    assert wisher.neighbour.reserve_up_to(Kind.KV, 1 << 20)
    usable = elastic.allocator.usable_tokens()
    scheduler_side._grow(None, 6 * 2 * MIB)
    wisher.turn()
    assert wisher.asked == [6]
    wisher.neighbour.release(Kind.KV, wisher.neighbour.held(Kind.KV))
    wisher.turn()
    assert elastic.allocator.usable_tokens() == usable + 6 * 64, "no more than it wished for"
    elastic.ledger.close()


def test_what_victims_say_is_read_with_its_parts() -> None:
    from benchmarks.gpu import share

    parts = " (chosen after 12.9, unmapped after 50.1)"
    text = f"reclaim: gave 1664 MiB back to neighbours in 52.7 ms{parts}, lost 1529 cached tokens, keeps 9 MiB of KV"
    found = re.search(share.GAVE, text)
    assert found is not None
    assert found.groups() == ("1664", "52.7", "12.9", "1529")


def test_memory_that_many_tensors_look_at_is_counted_once() -> None:
    from benchmarks.gpu.scheduler_side import blocks_in_use

    blocks = [(4096, 1024), (1024, 1024), (8192, 512)]
    storages = [(1024, 100), (1100, 900), (1024, 50), (2048, 4096), (4096, 1024), (99999, 8), (0, 8)]
    assert blocks_in_use(blocks, storages) == {(1024, 1024): (1100, 900), (4096, 1024): (4096, 1024)}
    assert blocks_in_use([], storages) == {}


class StandInHttp:
    """What eight_models.py asks of the launcher. Token n of an answer is the number of the question + n."""

    def __init__(self, models: list[str]) -> None:
        self.models = models
        self.asleep: list[str] = []
        self.refused = 0  # of the next questions
        self.fails = False  # every question

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/metrics":
            names = dict.fromkeys(self.asleep)
            lines = [f'prism_model_sleeps_total{{model="{m}"}} {self.asleep.count(m)}.0' for m in names]
            return httpx.Response(200, text="\n".join(lines))
        if path.endswith("/generate"):
            model = path.split("/")[2]
            if self.fails:
                return httpx.Response(503)
            self.asleep.append(model)
            return httpx.Response(200, json={"output_ids": json.loads(request.content)["input_ids"][:3]})
        return httpx.Response(200)


@pytest.mark.parametrize(
    ("trouble", "code", "missed"),
    [
        ("", 0, set()),
        ("nobody sleeps", 1, {"models that slept"}),
        (
            "all is lost",
            1,
            {"answered of 16", "models that slept", "cold 8B in the running system: first answer"},
        ),
        ("wrong", 1, {"answers that differ from the model alone"}),
    ],
)
def test_eight_models_ends_with_1_unless_all_is_well(
    trouble: str, code: int, missed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import eight_models

    http = StandInHttp([])
    real_client, asked = httpx.AsyncClient, 0

    async def ask(client: httpx.AsyncClient, model: str, number: int) -> tuple[list[int], float]:
        nonlocal asked
        asked += 1
        http.fails = trouble == "all is lost" and asked > 16
        tokens, seconds = await really_ask(client, model, number)
        if trouble == "nobody sleeps":
            http.asleep.clear()
        return [*tokens, asked] if trouble == "wrong" else tokens, seconds

    really_ask = eight_models.ask
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["eight_models", "--requests", "16"])
    monkeypatch.setattr(eight_models, "ask", ask)
    monkeypatch.setattr(eight_models, "write_model", lambda *_: None)
    monkeypatch.setattr(eight_models, "serving", lambda *_: contextlib.nullcontext(1.5))
    monkeypatch.setattr(
        eight_models.httpx,
        "AsyncClient",
        lambda **kwargs: real_client(**kwargs, transport=httpx.MockTransport(http)),
    )
    if code:
        with pytest.raises(SystemExit, match="1"):
            eight_models.main()
    else:
        eight_models.main()
    rows = json.loads((tmp_path / "eight_models.json").read_text())["rows"]
    assert {row["what"] for row in rows if row["met"] is False} == missed
