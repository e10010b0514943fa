"""What /metrics shows, made from messages and from a real ledger."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from prism_sgl.allocator.ledger import Ledger
from prism_sgl.config import Config, load
from prism_sgl.launch.answers import Answers
from prism_sgl.launch.ledger_reader import DeviceMemory, LedgerReader, OwnerMemory, parse_ledgers
from prism_sgl.launch.metrics import Metrics
from prism_sgl.messages import DeviceStatus, ModelStatus, RuntimeId, RuntimeState, Status

GIB = 1 << 30


def model(wakes: int = 0) -> ModelStatus:
    return ModelStatus(
        name="chat",
        state=RuntimeState.ASLEEP,
        device="host0",
        runtime=RuntimeId("chat@host0.1-1"),
        queued=3,
        in_flight=2,
        weights_bytes=GIB,
        kv_bytes=0,
        pinned=False,
        wakes=wakes,
        starts=1,
        last_wake_s=0.3,
    )


def status(wakes: int = 0) -> Status:
    device = DeviceStatus(name="host0", budget_bytes=GIB, charged_bytes=GIB, kvpr=0.5)
    return Status(epoch=1, models=[model(wakes)], devices=[device], undecodable=4)


def render(metrics: Metrics) -> list[str]:
    return metrics.render().decode().splitlines()


def test_requests_are_counted_by_model_endpoint_and_code() -> None:
    metrics = Metrics(lambda: [], lambda: 0)
    metrics.begun()
    metrics.ended("chat", "/generate", "200")
    metrics.answered("chat", ttft_s=0.2, queue_s=0.01, duration_s=1.0)
    lines = render(metrics)
    assert 'prism_requests_total{code="200",endpoint="/generate",model="chat"} 1.0' in lines
    assert 'prism_request_ttft_seconds_bucket{le="0.25",model="chat"} 1.0' in lines
    assert 'prism_request_ttft_seconds_bucket{le="0.1",model="chat"} 0.0' in lines
    assert 'prism_request_queue_seconds_sum{model="chat"} 0.01' in lines
    assert 'prism_request_duration_seconds_count{model="chat"} 1.0' in lines


def test_models_and_devices_are_as_the_router_told() -> None:
    metrics = Metrics(lambda: [], lambda: 7)
    metrics.told(status())
    lines = render(metrics)
    assert 'prism_queue_depth{model="chat"} 3.0' in lines
    assert 'prism_inflight{model="chat"} 2.0' in lines
    assert 'prism_model_state{model="chat",state="asleep"} 1.0' in lines
    assert 'prism_model_state{model="chat",state="awake"} 0.0' in lines
    assert 'prism_model_activations_total{from="cold",model="chat"} 1.0' in lines
    assert 'prism_undecodable_frames_total{process="api_server"} 7.0' in lines
    assert 'prism_undecodable_frames_total{process="router"} 4.0' in lines


def test_a_wake_is_observed_once() -> None:
    metrics = Metrics(lambda: [], lambda: 0)
    for wakes in (
        1,
        1,
        2,
        2,
        0,
        1,
    ):  # what was before us is not ours to observe; then the router starts again
        metrics.told(status(wakes))
    assert 'prism_wake_seconds_count{model="chat"} 2.0' in render(metrics)
    assert 'prism_wake_seconds_bucket{le="0.4",model="chat"} 2.0' in render(metrics)


def test_memory_is_summed_by_device_and_model() -> None:
    owners = [
        OwnerMemory("chat", weights_bytes=4, kv_bytes=2, overhead_bytes=1),
        OwnerMemory("chat", weights_bytes=4, kv_bytes=0, overhead_bytes=1),
        OwnerMemory("code", weights_bytes=8, kv_bytes=1, overhead_bytes=0),
    ]
    memory = DeviceMemory("host0", free_bytes=5, returning_bytes=6, owners=owners)
    lines = render(Metrics(lambda: [memory], lambda: 0))
    for kind, size in (("weights", 16), ("kv", 3), ("overhead", 2), ("free", 5), ("returning", 6)):
        assert f'prism_device_memory_bytes{{device="host0",kind="{kind}"}} {size}.0' in lines
    assert 'prism_model_memory_bytes{device="host0",kind="weights",model="chat"} 8.0' in lines


def test_ledgers_are_read(tmp_path: Path) -> None:
    path = str(tmp_path / "host0.ledger")
    with Ledger.create(path, 64 << 20, "host0") as ledger:
        owner = ledger.join("chat@host0.1-1", floor=1, ceiling=8, priority=0, bell="")
        reader = LedgerReader(parse_ledgers(f"host0={path}"))
        (memory,) = reader()
        assert (memory.device, memory.free_bytes) == ("host0", 64 << 20)
        assert [owner.model for owner in memory.owners] == ["chat"]
        reader.close()
        owner.leave()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "models.toml"
    device = '[[devices]]\nname = "host0"\nkind = "host"\nmemory = "64MiB"\n'
    file.write_text(device + "".join(f'[models.{name}]\npath = "{tmp_path}"\n' for name in ("chat", "code")))
    return load(file)


def test_memory_of_models_is_the_ledgers_at_one_moment(config: Config) -> None:
    """The runtime of chat said a GiB of weights; since then a neighbour has taken half of it."""
    reads = []

    def read() -> list[DeviceMemory]:
        reads.append(1)
        owners = [
            OwnerMemory("chat", weights_bytes=GIB // 2, kv_bytes=0, overhead_bytes=1),
            OwnerMemory("code", weights_bytes=8, kv_bytes=GIB // 2, overhead_bytes=0),
        ]
        return [DeviceMemory("host0", free_bytes=0, returning_bytes=0, owners=owners)]

    forwarder = cast(Any, SimpleNamespace(status=None))
    answers = Answers(config, forwarder, Metrics(read, lambda: 0), read)
    answers.told(status())

    def ask(path: str) -> Any:
        route, call = SimpleNamespace(path=path), SimpleNamespace(model=None)
        return json.loads(asyncio.run(answers.answer(cast(Any, route), cast(Any, call))).body)

    chat, code = ask("/api/v1/models")["models"]
    assert (chat["weights_bytes"], chat["kv_bytes"]) == (GIB // 2, 0)
    assert "weights_bytes" not in code, "the router has not told of it yet"
    assert len(reads) == 1
    assert ask("/v1/models")["data"][0]["prism"]["weights_bytes"] == GIB // 2
    assert ask("/api/ps")["models"][0]["size_vram"] == GIB // 2
