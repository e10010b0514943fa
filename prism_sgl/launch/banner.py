"""What is printed once the models are up: where to ask, whom, and how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from prism_sgl.config import Config


def base_url(config: Config) -> str:
    host = config.server.host
    if host in ("0.0.0.0", "::"):  # every address; loopback is one that the reader can use
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{config.server.port}"


def ready_lines(config: Config, states: Mapping[str, str]) -> Iterator[str]:
    yield f"address: {base_url(config)}"
    for model in config.models.values():
        names = f"{model.name} ({', '.join(model.aliases)})" if model.aliases else model.name
        yield f"model: {names}: {states.get(model.name, 'starts at its first request')}"
    yield f"try: {curl_line(config)}"


def curl_line(config: Config) -> str:
    question = {
        "model": next(iter(config.models)),
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    key = ' -H "Authorization: Bearer $PRISM_API_KEY"' if config.server.api_keys else ""
    return (
        f"curl {base_url(config)}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(question)}'"
    )
