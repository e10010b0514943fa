"""What we answer ourselves: health, lists of models, states, and what operators ask. Never by way of a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from prism_sgl.config import Config, ModelConfig
from prism_sgl.launch.call import Call
from prism_sgl.launch.errors_http import HttpError, unknown_model
from prism_sgl.launch.forwarding import Forwarder
from prism_sgl.launch.ledger_reader import ReadMemory
from prism_sgl.launch.metrics import CONTENT_TYPE, Metrics
from prism_sgl.launch.routes import Route
from prism_sgl.messages import ModelStatus, RuntimeState, Status

JSON = b"application/json"
TEXT = b"text/plain; charset=utf-8"
LIVING = frozenset({RuntimeState.AWAKE, RuntimeState.DRAINING, RuntimeState.ASLEEP, RuntimeState.WAKING})
_ADMIN_PATH = "/api/v1/models/{model:path}/"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    content_type: bytes = JSON


def _json(content: object, status: int = 200) -> Answer:
    return Answer(status, msgspec.json.encode(content))


class Answers:
    """Owner of what was learned from Status: the last state of each model, and who has been up once."""

    def __init__(
        self, config: Config, forwarder: Forwarder, metrics: Metrics, read_memory: ReadMemory
    ) -> None:
        self._read_memory = read_memory
        self._config = config
        self._forwarder = forwarder
        self._metrics = metrics
        self._names = {
            alias: model.name for model in config.models.values() for alias in (model.name, *model.aliases)
        }
        self._models: dict[str, ModelStatus] = {}
        self._settled: set[str] = set()
        self._created = int(time.time())
        try:
            self._version = version("prism_sgl")
        except PackageNotFoundError:  # run from a checkout that is not installed
            self._version = "0+unknown"

    # ------------------------------------------------------------ what is known

    def told(self, status: Status) -> None:
        self._models = {model.name: model for model in status.models}
        # A model that failed is settled too: it must not keep the others from being used.
        self._settled |= {
            model.name
            for model in status.models
            if model.state in LIVING or model.state is RuntimeState.FAILED
        }

    def resolve(self, name: str) -> str:
        """The configured name behind a name or alias. Raises HttpError 404."""
        found = self._names.get(name)
        if found is None:
            raise unknown_model(name[:200])
        return found

    def model_or_only(self, name: object, *, where: str) -> str:
        """Raises HttpError 400 if none is given and there are several, 404 if it is not configured."""
        if isinstance(name, str) and name:
            return self.resolve(name)
        if name is not None and not isinstance(name, str):
            raise HttpError(400, "invalid_model", "model is not a string", param="model")
        if len(self._config.models) == 1:
            return next(iter(self._config.models))
        message = f"which model? Give it {where}, or use the base URL /m/<model>/; GET /v1/models lists them"
        raise HttpError(400, "model_required", message, param="model")

    def status_of(self, model: str) -> ModelStatus | None:
        return self._models.get(model)

    # ------------------------------------------------------------ answers

    async def answer(self, route: Route, call: Call) -> Answer:
        path = route.path
        if path.startswith(_ADMIN_PATH):
            verb, device = path.removeprefix(_ADMIN_PATH), call.query_value("device") or ""
            if verb == "move" and not device:
                raise HttpError(400, "device_required", "which device? Give it as ?device=", param="device")
            return await self._ask(verb, self.resolve(call.params["model"]), device)
        match path:
            case "/":
                return Answer(200, b"prism_sgl is running\n", TEXT)
            case "/live" | "/ping":
                return _json({"live": True})
            case "/health" | "/health_generate":
                return self._health(call)
            case "/ready":
                return self._ready()
            case "/metrics":
                return Answer(200, self._metrics.render(), CONTENT_TYPE)
            case "/v1/models":
                names = [call.model] if call.model is not None else list(self._config.models)
                return _json({"object": "list", "data": [*map(self._card, self._details(names))]})
            case "/v1/models/{model:path}":
                return _json(self._card(self._detail(self.resolve(call.params["model"]))))
            case "/api/v1/models":
                return _json({"models": self._details(self._config.models)})
            case "/api/v1/models/{model:path}":
                return _json(self._detail(self.resolve(call.params["model"])))
            case "/api/v1/devices":
                return _json({"devices": self._forwarder.status.devices if self._forwarder.status else []})
            case "/api/v1/events":
                return _json({"events": self._forwarder.status.events if self._forwarder.status else []})
            case "/api/version":
                return _json({"version": self._version})
            case "/api/tags":
                return _json({"models": [*map(self._ollama, self._details(self._config.models))]})
            case "/api/ps":
                return _json({"models": [*map(self._ollama, self._details(self._living()))]})
            case "/running":
                running = [
                    {"model": name, "state": _llama_swap(self._state(name))} for name in self._living()
                ]
                return _json({"running": running})
            case "/is_sleeping":
                return _json({"is_sleeping": self._state(self._named(call)) is RuntimeState.ASLEEP})
            case "/sleep":
                return await self._ask("sleep", self._named(call))
            case "/wake_up":
                return await self._ask("wake", self._named(call))
            case "/api/models/unload/{model:path}":
                return await self._ask("unload", self.resolve(call.params["model"]))
        raise AssertionError(f"no answer for {path}")

    def _named(self, call: Call) -> str:
        given = call.model if call.model is not None else call.query_value("model")
        return self.model_or_only(given, where="as ?model=")

    def _living(self) -> list[str]:
        return [name for name in self._config.models if self._state(name) in LIVING]

    def _state(self, name: str) -> RuntimeState:
        status = self._models.get(name)
        return status.state if status is not None else RuntimeState.COLD

    def _health(self, call: Call) -> Answer:
        lives = self._forwarder.router_lives
        states = {name: self._state(name) for name in self._config.models}
        if call.model is not None:
            lives = lives and states[call.model] in LIVING
            states = {call.model: states[call.model]}
        text = "ok" if lives else "the router is silent" if call.model is None else "not loaded"
        return _json({"status": text, "models": states}, 200 if lives else 503)

    def _ready(self) -> Answer:
        waiting = [m.name for m in self._config.models.values() if m.preload and m.name not in self._settled]
        if not self._forwarder.router_lives:
            reason = "the router is silent"
        elif waiting:
            reason = f"still starting: {', '.join(waiting)}"
        else:
            reason = ""
        states = {name: self._state(name) for name in self._config.models}
        content = {"ready": not reason, "reason": reason, "models": states}
        return _json(content, 503 if reason else 200)

    def _card(self, detail: Mapping[str, Any]) -> Mapping[str, object]:
        """As OpenAI and SGLang show a model; ``prism`` is ours."""
        name = detail["name"]
        model = self._config.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "prism_sgl",
            "root": name,
            "parent": None,
            "max_model_len": _context_tokens(model) or None,
            "prism": {key: value for key, value in detail.items() if key != "name"},
        }

    def _detail(self, name: str) -> dict[str, Any]:
        return self._details([name])[0]

    def _details(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Memory is the ledger's, read once for all: what runtimes told one after the other adds up to more than there
        is, while it goes from one to another."""
        memory = {device.device: device for device in self._read_memory()}
        details = []
        for name in names:
            model, status = self._config.models[name], self._models.get(name)
            known: dict[str, Any] = (
                msgspec.structs.asdict(status) if status else {"name": name, "state": RuntimeState.COLD}
            )
            if status and (device := memory.get(status.device or "")):
                held = device.of(name)
                known |= {"weights_bytes": held.weights_bytes, "kv_bytes": held.kv_bytes}
            known |= {
                "aliases": model.aliases,
                "priority": model.priority,
                "kv_share": model.kv_share,
                "slo": {"ttft_ms": model.slo.ttft_s * 1000.0, "tpot_ms": model.slo.tpot_s * 1000.0},
            }
            details.append(known)
        return details

    def _ollama(self, detail: Mapping[str, Any]) -> Mapping[str, object]:
        name, weights_bytes = detail["name"], detail.get("weights_bytes", 0)
        return {
            "name": name,
            "model": name,
            "modified_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._created)),
            "size": self._config.models[name].weights_bytes or weights_bytes,
            "size_vram": weights_bytes + detail.get("kv_bytes", 0),
            "digest": "",
            "details": {"format": "sglang", "family": "", "parameter_size": "", "quantization_level": ""},
        }

    async def _ask(self, verb: str, model: str, device: str = "") -> Answer:
        if not self._forwarder.router_lives:
            raise HttpError(503, "router_silent", "the router does not answer; try again", retry_after_s=1.0)
        reply = await self._forwarder.ask(verb, model, device)
        if reply.status >= 400:
            retry_after_s = 5.0 if reply.status in (429, 503) else None
            raise HttpError(reply.status, f"{verb}_refused", reply.message, retry_after_s=retry_after_s)
        return _json({"model": model, "verb": verb, "message": reply.message}, reply.status)


def _context_tokens(model: ModelConfig) -> int:
    given = model.engine_args.get("context_length")
    return given if isinstance(given, int) else model.context_tokens


def _llama_swap(state: RuntimeState) -> str:
    return "ready" if state is RuntimeState.AWAKE else str(state)
