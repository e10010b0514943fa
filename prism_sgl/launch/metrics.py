"""What Prometheus reads at /metrics: requests as this api_server saw them, models and devices as told."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prism_sgl.launch.ledger_reader import ReadMemory
from prism_sgl.messages import RuntimeState, Status

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_DURATION_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_WAKE_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Owner of one registry of its own: SGLang's ``sglang:*`` never mix with ours."""

    def __init__(self, read_memory: ReadMemory, count_undecodable: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._told = _Told(read_memory, count_undecodable)
        self._registry.register(self._told)
        registry = self._registry
        self._requests = Counter(
            "prism_requests", "Requests answered", ("model", "endpoint", "code"), registry=registry
        )
        self._ttft = Histogram(
            "prism_request_ttft_seconds",
            "From a request's arrival to the first byte of its answer",
            ("model",),
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            "prism_request_duration_seconds",
            "From a request's arrival to the last byte of its answer",
            ("model",),
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self._queue = Histogram(
            "prism_request_queue_seconds",
            "From a request's arrival to its grant, waking of the model included",
            ("model",),
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self._wake = Histogram(
            "prism_wake_seconds", "Waking of a model", ("model",), buckets=_WAKE_BUCKETS, registry=registry
        )
        self._inflight = Gauge(
            "prism_api_inflight", "Requests at this api_server, waiting or answered", registry=registry
        )
        self._children: dict[tuple[str, str, str], Counter] = {}
        self._histograms: dict[str, tuple[Histogram, Histogram, Histogram]] = {}
        self._num_wakes: dict[str, int] = {}

    def begun(self) -> None:
        self._inflight.inc()

    def ended(self, model: str, endpoint: str, code: str) -> None:
        """``code``: an HTTP status, or "cancelled" if the client went away first."""
        self._inflight.dec()
        key = (model, endpoint, code)
        if (child := self._children.get(key)) is None:
            child = self._children[key] = self._requests.labels(*key)
        child.inc()

    def answered(self, model: str, *, ttft_s: float | None, queue_s: float, duration_s: float) -> None:
        """A generation came to its end."""
        histograms = self._histograms.get(model)
        if histograms is None:
            histograms = self._histograms[model] = (
                self._ttft.labels(model),
                self._queue.labels(model),
                self._duration.labels(model),
            )
        ttft, queue, duration = histograms
        if ttft_s is not None:
            ttft.observe(ttft_s)
        queue.observe(queue_s)
        duration.observe(duration_s)

    def told(self, status: Status) -> None:
        self._told.status = status
        for model in status.models:
            before = self._num_wakes.get(model.name, model.wakes)
            self._num_wakes[model.name] = model.wakes
            if model.wakes > before:
                self._wake.labels(model.name).observe(model.last_wake_s)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Told(Collector):
    """Gauges that are made when somebody reads: from the router's last Status, and the ledgers."""

    def __init__(self, read_memory: ReadMemory, count_undecodable: Callable[[], int]) -> None:
        self.status: Status | None = None
        self._read_memory = read_memory
        self._count_undecodable = count_undecodable

    def describe(self) -> Iterable[Metric]:
        return []  # names are known only when read; none of them is registered elsewhere

    def collect(self) -> Iterable[Metric]:
        yield self._undecodable()
        if self.status is not None:
            yield from _of_models(self.status)
        yield from self._of_memory()

    def _undecodable(self) -> Metric:
        frames = CounterMetricFamily(
            "prism_undecodable_frames",
            "Frames that were dropped because they do not decode",
            labels=["process"],
        )
        frames.add_metric(["api_server"], self._count_undecodable())
        frames.add_metric(["router"], self.status.undecodable if self.status is not None else 0)
        return frames

    def _of_memory(self) -> Iterable[Metric]:
        devices = GaugeMetricFamily(
            "prism_device_memory_bytes", "The budget of a device by use", labels=["device", "kind"]
        )
        models = GaugeMetricFamily(
            "prism_model_memory_bytes", "What a model holds on a device", labels=["model", "device", "kind"]
        )
        for memory in self._read_memory():
            owners = memory.owners
            for kind, size in (
                ("weights", sum(owner.weights_bytes for owner in owners)),
                ("kv", sum(owner.kv_bytes for owner in owners)),
                ("overhead", sum(owner.overhead_bytes for owner in owners)),
                ("returning", memory.returning_bytes),
                ("free", memory.free_bytes),
            ):
                devices.add_metric([memory.device, kind], size)
            for model in dict.fromkeys(owner.model for owner in owners):
                held = memory.of(model)
                for kind, size in (
                    ("weights", held.weights_bytes),
                    ("kv", held.kv_bytes),
                    ("overhead", held.overhead_bytes),
                ):
                    models.add_metric([model, memory.device, kind], size)
        yield devices
        yield models


def _of_models(status: Status) -> Iterable[Metric]:
    queue = GaugeMetricFamily("prism_queue_depth", "Requests that wait for a grant", labels=["model"])
    late = GaugeMetricFamily(
        "prism_queue_late", "Waiting requests that miss their TTFT even if they ran at once", labels=["model"]
    )
    slack = GaugeMetricFamily(
        "prism_queue_slack_seconds",
        "Time to spare of the waiting request that has least; negative: it is late",
        labels=["model"],
    )
    prefill = GaugeMetricFamily(
        "prism_prefill_tokens_per_second", "Learned speed of a prefill; 0: not known", labels=["model"]
    )
    hits = GaugeMetricFamily(
        "prism_prefix_hit_ratio", "Learned part of a prompt that the prefix cache has", labels=["model"]
    )
    running = GaugeMetricFamily("prism_inflight", "Requests at the model's runtime", labels=["model"])
    states = GaugeMetricFamily(
        "prism_model_state", "1 for the state that the model is in", labels=["model", "state"]
    )
    activations = CounterMetricFamily(
        "prism_model_activations", "How often a model was made ready", labels=["model", "from"]
    )
    sleeps = CounterMetricFamily("prism_model_sleeps", "How often a model went to sleep", labels=["model"])
    moves = CounterMetricFamily("prism_model_moves", "How often a model moved to a device", labels=["model"])
    for model in status.models:
        queue.add_metric([model.name], model.queued)
        late.add_metric([model.name], model.late)
        if model.slack_s is not None:
            slack.add_metric([model.name], model.slack_s)
        prefill.add_metric([model.name], model.prefill_tokens_per_s)
        hits.add_metric([model.name], model.hit_ratio)
        running.add_metric([model.name], model.in_flight)
        for state in RuntimeState:
            states.add_metric([model.name, state.value], model.state is state)
        activations.add_metric([model.name, "asleep"], model.wakes)
        activations.add_metric([model.name, "cold"], model.starts)
        sleeps.add_metric([model.name], model.sleeps)
        moves.add_metric([model.name], model.moves)
    pressure = GaugeMetricFamily(
        "prism_device_pressure",
        "The part of a device that is asked for, of its KV memory and of its time; above 1: more than there is",
        labels=["device", "kind"],
    )
    kvpr = GaugeMetricFamily("prism_kvpr", "Pressure on a device's KV memory", labels=["device"])
    charged = GaugeMetricFamily(
        "prism_device_charged_bytes", "What the router counts as held on a device", labels=["device"]
    )
    for device in status.devices:
        kvpr.add_metric([device.name], device.kvpr)
        pressure.add_metric([device.name, "kv"], device.kv_pressure)
        pressure.add_metric([device.name, "compute"], device.compute_pressure)
        charged.add_metric([device.name], device.charged_bytes)
    yield from (queue, late, slack, prefill, hits, running, states, activations, sleeps, moves)
    yield from (kvpr, pressure, charged)
