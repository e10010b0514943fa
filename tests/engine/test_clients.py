"""Clients that know nothing of us: openai's, SGLang's own, and ones that send nonsense."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.engine.reference import greedy, tokens_of
from tests.engine.system import System, wait_for

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(system: System) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0, timeout=120)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_openai_lists_all_models(client: openai.OpenAI) -> None:
    assert {"chat", "code"} <= {model.id for model in client.models.list()}


@pytest.mark.parametrize("model", ["chat", "code"])
def test_ps_tells_whose_an_engine_is(system: System, model: str) -> None:
    shown = system.processes()[system.runtime_pids(model)["scheduler"]]
    assert shown.startswith(f"sglang::scheduler {model}@host0.")


@pytest.mark.parametrize("model", ["chat", "small", "code"])
def test_openai_chat(client: openai.OpenAI, model: str) -> None:
    reply = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in reply.choices[0].message.content
    assert reply.usage.completion_tokens > 0


def test_openai_streaming_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="chat", messages=QUESTION, max_tokens=16, temperature=0)
    stream = client.chat.completions.create(
        model="chat", messages=QUESTION, max_tokens=16, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len([p for p in parts if p]) > 1
    assert "".join(parts) == whole.choices[0].message.content


def test_openai_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="code", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert " Paris" in reply.choices[0].text


def test_openai_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}},
        "required": ["age"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "How old is a ten year old? Answer in JSON."}],
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "age", "schema": schema}},
    )
    assert isinstance(json.loads(reply.choices[0].message.content)["age"], int)


def test_openai_tools_are_accepted(client: openai.OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    reply = client.chat.completions.create(
        model="chat", messages=QUESTION, max_tokens=8, temperature=0, tools=[tool]
    )
    assert reply.choices[0].finish_reason in {"length", "stop", "tool_calls"}


def test_native_client(system: System) -> None:
    """SGLang's RuntimeEndpoint, in a process of its own (it imports all of sglang's language)."""
    import subprocess
    import sys

    script = f"""
import sglang as sgl
backend = sgl.RuntimeEndpoint("{system.url}/m/chat")
sgl.set_default_backend(backend)
@sgl.function
def capital(s):
    s += "The capital of France is" + sgl.gen("answer", max_tokens=4, temperature=0)
print("ANSWER", capital.run()["answer"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert "ANSWER  Paris" in done.stdout, done.stderr[-2000:]


def test_a_client_that_goes_away_frees_its_slots(system: System) -> None:
    ids = tokens_of("Tell me a very long story about a")
    body = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": 480, "ignore_eos": True},
        "stream": True,
    }
    with system.client.stream("POST", "/m/chat/generate", json=body) as reply:
        parts = reply.iter_bytes()  # kept: a collected iterator closes the connection
        next(parts)
        wait_for("the router to know it", lambda: system.status("chat")["in_flight"] == 1)
    wait_for("the request to leave", lambda: system.status("chat")["in_flight"] == 0, timeout_s=15)

    def nothing_runs() -> bool:
        loads = system.client.get("/m/chat/v1/loads").json()["loads"]
        return all(load["num_running_reqs"] == 0 for load in loads)

    # 480 tokens would take half a minute.
    wait_for("the engine to drop it", nothing_runs, timeout_s=10)
    assert system.generate("chat", ids, 8)["output_ids"] == greedy(tuple(ids), 8)


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        ("/v1/chat/completions", b'{"model": "nobody", "messages": []}', 404, "model_not_found"),
        ("/v1/chat/completions", b'{"model": "chat", ', 400, "invalid_json"),
        ("/m/nobody/generate", b"{}", 404, "model_not_found"),
        ("/m/chat/release_memory_occupation", b"{}", 403, "refused"),
    ],
)
def test_bad_requests_get_openai_errors(
    system: System, path: str, content: bytes, status: int, code: str
) -> None:
    reply = system.client.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["message"]


def test_a_prompt_that_can_never_fit_is_refused(system: System) -> None:
    reply = system.client.post(
        "/m/chat/generate",
        json={"input_ids": list(range(100, 1400)), "sampling_params": {"max_new_tokens": 4}},
    )
    assert reply.status_code == 400


def test_a_model_that_cannot_load_says_why_and_the_others_serve(system: System) -> None:
    wait_for("it to have failed", lambda: system.status("broken")["state"] == "failed")
    assert "weights" in system.status("broken")["reason"]
    reply = system.client.post("/m/broken/generate", json={"text": "a"})
    assert reply.status_code == 503
    assert "weights" in reply.json()["error"]["message"]
    assert system.status("chat")["state"] == "awake"


def test_health_never_touches_a_model(system: System) -> None:
    assert system.admin("sleep", "code").status_code == 200
    for path in ("/health", "/ready", "/v1/models", "/metrics"):
        assert httpx.get(f"{system.url}{path}").status_code == 200
    assert system.status("code")["state"] == "asleep"
