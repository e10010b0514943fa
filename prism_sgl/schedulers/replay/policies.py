"""The policies by name, and what of each may be tuned. Every baseline gets the best of its tunings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism_sgl.schedulers.replay import splits
from prism_sgl.schedulers.replay.cluster import Cluster, Policy
from prism_sgl.schedulers.replay.fixed import Fixed, split_kv
from prism_sgl.schedulers.replay.paper import Paper
from prism_sgl.schedulers.replay.prism import replay_prism
from prism_sgl.schedulers.replay.prototype import Prototype
from prism_sgl.schedulers.replay.spec import Arrival, Fleet, Replayed, span_s
from prism_sgl.schedulers.replay.swapping import Swapping

Progress = Callable[[int], None]
NAMES = ("prism", "static", "muxserve", "paper", "prototype", "qlm", "serverless")
# What a reader must know of a policy beside its name.
NOTES = {
    "prism": "the live Controller with its defaults",
    "static": "S-Partition; placement found by trying, told the whole trace in advance",
    "muxserve": "our MuxServe++: colocated, elastic KV, no sleep, no move; placement found by trying, told the trace",
    "paper": "Prism's Algorithms 1 and 2 as printed; period, tau and window chosen in its favour",
    "prototype": "prism-research's released policy: requests per GB, 15x, a pass every 5 s",
    "qlm": "our approximation of QLM: groups take turns on a device, a swap restarts the engine",
    "serverless": "our approximation of ServerlessLLM: one model a device at a time, loads at the link's speed + 1 s",
}


@dataclass(frozen=True)
class Tuning:
    """One way to run a policy."""

    text: str
    replay: Callable[[Sequence[Arrival], Progress], Replayed]


def alone(fleet: Fleet, model: str, arrivals: Sequence[Arrival]) -> Replayed:
    """One model on devices of its own."""
    spec = fleet.by_name()[model]
    own = Fleet(fleet.name, (spec,), spec.tp, fleet.device_bytes)
    devices = {model: tuple(range(spec.tp))}
    return Cluster(own).replay(Fixed("alone", devices), [a for a in arrivals if a.model == model])


def tunings(
    policy: str, fleet: Fleet, arrivals: Sequence[Arrival], *, tries: int = 4, check: bool = False
) -> list[Tuning]:
    """The best guess first. ``arrivals`` are what static and muxserve are told in advance."""

    def cluster(text: str, make: Callable[[], Policy]) -> Tuning:
        return Tuning(
            text,
            lambda listed, progress: Cluster(fleet, check=check).replay(make(), listed, progress=progress),
        )

    match policy:
        case "prism":
            return [
                Tuning(
                    "defaults",
                    lambda listed, progress: replay_prism(fleet, listed, check=check, progress=progress),
                )
            ]
        case "static" | "muxserve":
            loads = {m.name: alone(fleet, m.name, arrivals).gpu_busy for m in fleet.models}
            rates = _token_rates(arrivals) if policy == "static" else {}
            return [
                cluster(_show(placement), _fixed(policy, fleet, placement, rates))
                for placement in splits.candidates(fleet, loads, tries)
            ]
        case "paper":
            options = [(0.1, 16), (0.5, 64), (0.02, 64), (2.0, 64)][:tries]
            return [cluster(f"tau {tau}, window {w}", _paper(tau, w)) for tau, w in options]
        case "prototype":
            return [cluster("as released", Prototype)]
        case "qlm":
            options_s = [5.0, 15.0, 30.0][:tries]
            return [cluster(f"turns of {turn_s:g} s", _swapping("qlm", turn_s)) for turn_s in options_s]
        case _:
            return [cluster("as described", _swapping("serverless", 0.0))]


def _fixed(
    name: str, fleet: Fleet, placement: Mapping[str, tuple[int, ...]], rates: Mapping[str, float]
) -> Callable[[], Policy]:
    kv_bytes = split_kv(fleet, placement, rates) if name == "static" else None
    return lambda: Fixed(name, placement, kv_bytes)


def _paper(tau: float, window: int) -> Callable[[], Policy]:
    return lambda: Paper(tau=tau, window=window)


def _swapping(name: str, turn_s: float) -> Callable[[], Policy]:
    return lambda: Swapping(name, turn_s=turn_s)


def _token_rates(arrivals: Sequence[Arrival]) -> dict[str, float]:
    rates: dict[str, float] = {}
    seconds = max(span_s(arrivals), 1.0)
    for arrival in arrivals:
        tokens = arrival.prompt_tokens + arrival.output_tokens
        rates[arrival.model] = rates.get(arrival.model, 0.0) + tokens / seconds
    return rates


def _show(placement: Mapping[str, tuple[int, ...]]) -> str:
    devices: dict[int, list[str]] = {}
    for model, numbers in placement.items():
        for number in numbers:
            devices.setdefault(number, []).append(model)
    return "; ".join(f"gpu{i}: {' '.join(models)}" for i, models in sorted(devices.items()))
