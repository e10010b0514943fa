"""A small fleet for replays: round numbers, so that a test can say what must come out."""

from __future__ import annotations

from dataclasses import replace

from prism_sgl.schedulers.replay.spec import Arrival, Fleet, ModelCosts, ModelSpec, Slo

MIB = 1 << 20
COSTS = ModelCosts(
    weights_bytes=1000 * MIB,
    overhead_bytes=100 * MIB,
    asleep_bytes=40 * MIB,
    kv_bytes_per_token=MIB // 10,
    page_bytes=10 * MIB,  # 100 tokens
    floor_bytes=100 * MIB,
    context_tokens=1000,
    latency_s=0.01,
    pass_s=0.01,
    prefill_s_per_token=0.0001,
    step_s=0.01,
    step_s_per_request=0.001,
    step_s_per_token=0.0,
    wake_s=0.3,
    sleep_s=0.03,
    start_s=1.0,
    map_s_per_page=0.0,
    max_running=8,
)


def spec(name: str, **costs: float) -> ModelSpec:
    """A model as a fleet has it: before its first Hello, the Controller counts 2 GiB for an engine on a card."""
    costs = {"overhead_bytes": 2148 * MIB, "asleep_bytes": 800 * MIB, **costs}
    return ModelSpec(name, replace(COSTS, **costs), 0, slo=Slo(0.5, 0.05))  # type: ignore[arg-type]


def fleet(*models: ModelSpec, devices: int = 1, device_mib: int = 7000) -> Fleet:
    """A device holds two models awake (3,248 MiB each), unless told otherwise."""
    return Fleet("test", models, devices, device_mib * MIB)


def steady(model: str, count: int, every_s: float, tokens: tuple[int, int] = (100, 20)) -> list[Arrival]:
    return [Arrival(number * every_s, model, *tokens) for number in range(count)]
