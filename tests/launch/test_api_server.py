"""What clients and operators see, over real processes: api_server, router and fake engines."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
from openai import NotFoundError, OpenAI

from prism_sgl import addresses
from tests.launch.stack import Stack, running, wait_for

HELLO = [{"role": "user", "content": "hello"}]
BAD_MS = ("soon", "0", "-5", "nan", "inf", "1e12", "9" * 100, "")


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    extra = '[models.small]\npath = "MODEL"\naliases = ["tiny"]\n'
    with running(("chat", "code"), server='max_body = "64KiB"', extra=extra) as stack:
        yield stack


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def read_slowly(stack: Stack, body: dict[str, Any]) -> socket.socket:
    """Send a request and read nothing of the answer."""
    client = socket.create_connection(("127.0.0.1", stack.port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n"
    client.sendall(head.encode() + text)
    return client


# ---------------------------------------------------------------- clients


def test_openai_client_chats_streams_and_lists(stack: Stack) -> None:
    client: Any = OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="chat", messages=HELLO)
    assert answer.choices[0].message.content == "chat heard hello"
    stream = client.chat.completions.create(model="code", messages=HELLO, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "0 1 2 3 "
    assert [model.id for model in client.models.list()] == ["chat", "code", "small"]
    assert client.models.retrieve("tiny").id == "small"
    with pytest.raises(NotFoundError):
        client.models.retrieve("nobody")


def test_answer_tells_how_long_the_request_waited(stack: Stack) -> None:
    response = stack.client.post(
        "/v1/chat/completions", json={"model": "chat", "messages": HELLO}, headers={"x-request-id": "mine"}
    )
    assert response.headers["x-request-id"] == "mine"
    assert float(response.headers["x-prism-queue-ms"]) >= 0.0
    assert response.headers["x-prism-model-state"] == "warm"
    assert stack.chat("chat").headers["x-request-id"].startswith("api-")


def test_base_url_of_a_model_needs_no_name_in_the_body(stack: Stack) -> None:
    body = {"messages": HELLO}
    for name, model in (("chat", "chat"), ("tiny", "small")):
        answer = stack.client.post(f"/m/{name}/v1/chat/completions", json=body).json()
        assert answer["model"] == model
    assert stack.client.get("/m/code/get_model_info").json()["model_path"] == "/models/code"
    assert [m["id"] for m in stack.client.get("/m/code/v1/models").json()["data"]] == ["code"]
    assert stack.client.get("/m/nobody/model_info").status_code == 404


def test_keys_and_connection_headers_do_not_reach_the_engine(stack: Stack) -> None:
    headers = {"authorization": "Bearer secret", "x-api-key": "secret", "te": "trailers", "x-mine": "1"}
    answer = stack.client.post("/generate", json={"model": "chat", "headers": True}, headers=headers).json()
    assert answer["headers"]["x-mine"] == "1"
    assert not {"authorization", "x-api-key", "te", "connection"} & set(answer["headers"])
    assert int(answer["headers"]["content-length"]) == answer["body_bytes"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ('{"model": "nobody"}', 404, "model_not_found"),
        ('{"messages": []}', 400, "model_required"),
        ('{"model": 3}', 400, "invalid_model"),
        ('{"model": "chat"', 400, "invalid_json"),
        (b'{"model": "chat\xe9"}', 400, "invalid_json"),
        ("[1]", 400, "invalid_json"),
        ("", 400, "invalid_json"),
        ('{"model": "chat", "x": "' + "y" * 70_000 + '"}', 413, "request_too_large"),
    ],
    ids=["unknown", "no model", "odd model", "cut off", "not UTF-8", "list", "empty", "too large"],
)
def test_bad_bodies_are_refused(stack: Stack, body: str | bytes, status: int, code: str) -> None:
    response = stack.client.post("/v1/chat/completions", content=body)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert "x-request-id" in response.headers


def test_body_of_unknown_length_is_bounded_too(stack: Stack) -> None:
    response = stack.client.post("/generate", content=(b"x" * 1000 for _ in range(100)))
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("header", "value", "remedy"),
    [
        *(
            (header, value, "milliseconds")
            for header in ("x-slo-ttft-ms", "x-slo-tpot-ms")
            for value in BAD_MS
        ),
        ("x-llm-d-slo-ttft-ms", "1s", "milliseconds"),
        ("x-prism-priority", "soon", "whole number"),
        ("x-prism-priority", "1.5", "whole number"),
    ],
)
def test_bad_headers_are_refused(stack: Stack, header: str, value: str, remedy: str) -> None:
    for path, body in (("/generate", {}), ("/v1/chat/completions", {"messages": HELLO})):
        response = stack.client.post(path, json={"model": "chat", **body}, headers={header: value})
        assert response.status_code == 400
        error = error_of(response)
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error",
            "invalid_header",
            header,
        )
        assert header in error["message"]
        assert repr(value)[:20] in error["message"]
        assert remedy in error["message"]
        assert len(error["message"]) < 200


@pytest.mark.parametrize("tier", ["gold", "", 3, ["flex"]])
def test_service_tier_that_there_is_not_is_refused(stack: Stack, tier: object) -> None:
    response = stack.chat("chat", service_tier=tier)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == "service_tier"
    assert repr(tier) in error["message"]
    assert "flex" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/m/chat/release_memory_occupation", 403),
        ("POST", "/m/chat/update_weights_from_disk", 403),
        ("POST", "/pause_generation", 403),
        ("GET", "/v1/realtime", 403),
    ],
)
def test_routes_that_are_not_served_say_so(stack: Stack, method: str, path: str, status: int) -> None:
    response = stack.client.request(method, path)
    assert response.status_code == status
    assert error_of(response)["message"]


def test_app_that_raises_is_an_error_without_the_prompt(stack: Stack) -> None:
    response = stack.client.post("/generate", json={"model": "chat", "raise": True})
    assert response.status_code == 500
    assert "nobody shall read" not in response.text
    assert not any("nobody shall read" in line for line in stack.api.lines)


# ---------------------------------------------------------------- how soon


def promise_of(stack: Stack, headers: dict[str, str] | None = None, **body: object) -> dict[str, float]:
    """What the engine's own scheduler is told, on both ways into SGLang."""
    asked = {"model": "chat", "promise": True, **body}
    generated = stack.client.post("/generate", json=asked, headers=headers).json()["promise"]
    chatted = stack.client.post("/v1/chat/completions", json={**asked, "messages": HELLO}, headers=headers)
    answer: dict[str, float] = chatted.json()["promise"]
    assert answer["priority"] == generated["priority"]
    assert answer["in_s"] == pytest.approx(generated["in_s"], abs=0.5)
    return answer


@pytest.mark.parametrize(
    ("headers", "body", "in_s", "priority"),
    [
        ({}, {}, 2.0, 0),  # the model's default
        ({"x-slo-ttft-ms": "9000"}, {}, 9.0, 0),
        ({"x-llm-d-slo-ttft-ms": "7000", "x-slo-tpot-ms": "80"}, {}, 7.0, 0),
        ({}, {"priority": 3}, 2.0, 3),
        ({"x-prism-priority": "-2"}, {"priority": 3}, 2.0, -2),
        ({}, {"service_tier": "auto"}, 2.0, 0),
        ({}, {"service_tier": "default", "priority": 1}, 2.0, 1),
        ({}, {"service_tier": "standard_only"}, 2.0, 0),  # of Anthropic's API
        ({}, {"service_tier": "priority"}, 2.0, 1),
        ({}, {"service_tier": "flex"}, 20.0, -1),
        ({"x-slo-ttft-ms": "5000"}, {"service_tier": "flex"}, 5.0, -1),
        ({}, {"service_tier": None}, 2.0, 0),
    ],
)
def test_deadline_and_priority_reach_the_engine(
    stack: Stack, headers: dict[str, str], body: dict[str, object], in_s: float, priority: int
) -> None:
    promise = promise_of(stack, headers, **body)
    assert promise["in_s"] + promise["waited_s"] == pytest.approx(in_s, abs=0.1)
    assert 0.0 <= promise["waited_s"] < 2.0
    assert promise["priority"] == priority
    assert promise["needed_s"] >= 0.0  # of an engine that answers within a millisecond


def test_deadline_reaches_the_engine_of_a_stream_too(stack: Stack) -> None:
    headers = {"x-slo-ttft-ms": "8000"}
    body = {"model": "chat", "messages": HELLO, "stream": True, "promise": True, "chunks": 1}
    assert stack.client.post("/v1/chat/completions", json=body, headers=headers).status_code == 200
    seen = json.loads(stack.engine("chat").line("promise ").removeprefix("promise "))
    assert 6.0 < seen["in_s"] < 8.1


# ---------------------------------------------------------------- our own answers


def test_health_and_metrics_show_all_models(stack: Stack) -> None:
    assert stack.client.get("/health").json()["status"] == "ok"
    assert stack.client.get("/ready").json()["ready"] is True
    assert stack.client.get("/live").status_code == 200
    assert stack.client.get("/api/version").json()["version"]
    assert stack.client.get("/").status_code == 200
    names = [model["name"] for model in stack.client.get("/api/v1/models").json()["models"]]
    assert names == ["chat", "code", "small"]
    assert {m["model"] for m in stack.client.get("/running").json()["running"]} == set(names)
    assert {m["name"] for m in stack.client.get("/api/tags").json()["models"]} == set(names)
    before = stack.metric('prism_requests_total{code="200",endpoint="/generate",model="chat"}')
    stack.client.post("/generate", json={"model": "chat"})
    after = stack.metric('prism_requests_total{code="200",endpoint="/generate",model="chat"}')
    assert after == before + 1
    assert stack.metric('prism_model_state{model="chat",state="awake"}') == 1.0


def test_queue_and_slack_are_shown_while_requests_wait() -> None:
    with running(("chat",), hold_wakes=True) as stack:
        assert stack.client.post("/api/v1/models/chat/sleep").status_code == 200
        shown = stack.client.get("/v1/models/chat").json()["prism"]
        assert (shown["queued"], shown["slack_s"], shown["late"]) == (0, None, 0)
        engine = stack.engine("chat")
        answers: list[httpx.Response] = []

        def ask(ttft_ms: str) -> None:
            headers = {"x-slo-ttft-ms": ttft_ms}
            body = {"model": "chat", "messages": HELLO}
            answers.append(stack.client.post("/v1/chat/completions", json=body, headers=headers))

        clients = [threading.Thread(target=ask, args=(ttft_ms,)) for ttft_ms in ("1", "60000")]
        for client in clients:
            client.start()
        engine.line("waking 1")
        wait_for("queued", lambda: stack.metric('prism_queue_depth{model="chat"}') == 2.0)
        assert stack.metric('prism_queue_late{model="chat"}') == 1.0
        assert -30.0 < stack.metric('prism_queue_slack_seconds{model="chat"}') < 0.0
        shown = stack.client.get("/v1/models/chat").json()["prism"]
        assert (shown["queued"], shown["late"]) == (2, 1)
        assert shown["slack_s"] < 0.0
        engine.tell("release wake 1")
        for client in clients:
            client.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        wait_for("empty", lambda: stack.metric('prism_queue_depth{model="chat"}') == 0.0)
        assert stack.client.get("/v1/models/chat").json()["prism"]["slack_s"] is None


def test_model_sleeps_shows_it_and_wakes_on_its_next_request(stack: Stack) -> None:
    assert stack.client.post("/api/v1/models/small/sleep").status_code == 200
    wait_for("asleep", lambda: stack.state("small") == "asleep")
    assert stack.client.get("/is_sleeping", params={"model": "tiny"}).json() == {"is_sleeping": True}
    assert stack.client.get("/v1/models/small").json()["prism"]["state"] == "asleep"
    assert stack.client.get("/m/small/model_info").status_code == 200
    assert stack.state("small") == "asleep", "a question does not wake it"
    response = stack.chat("small")
    assert response.status_code == 200
    assert response.headers["x-prism-model-state"] == "activated"
    assert float(response.headers["x-prism-activation-ms"]) > 0.0
    wait_for("counted", lambda: stack.metric('prism_wake_seconds_count{model="small"}') == 1.0)


def test_pages_in_browsers_may_ask_models_but_not_operate(stack: Stack) -> None:
    page = {"origin": "http://evil.example"}
    assert stack.client.post("/api/v1/models/chat/sleep", headers=page).status_code == 403
    asked = {**page, "access-control-request-method": "POST"}
    assert stack.client.options("/v1/chat/completions", headers=asked).status_code == 200
    assert stack.client.options("/api/v1/models/chat/sleep", headers=asked).status_code == 403
    for names, allowed in (("authorization, x-mine", "authorization, x-mine"), (None, "authorization, *")):
        wanted = {**asked, "access-control-request-headers": names} if names else asked
        told = stack.client.options("/v1/chat/completions", headers=wanted).headers
        assert told["access-control-allow-headers"] == allowed, "a star does not stand for authorization"
    image = {"sec-fetch-site": "cross-site"}  # which sends no Origin
    assert stack.client.get("/m/chat/flush_cache", headers=image).status_code == 403
    rebound = {"host": "evil.example:8000", "sec-fetch-site": "same-origin"}  # its name leads here now
    assert stack.client.get("/api/v1/models/chat/explain", headers=rebound).status_code == 403
    for own in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", socket.gethostname()):
        assert stack.client.get("/api/v1/models/chat/explain", headers={"host": own}).status_code == 200
    proxied = {"x-forwarded-for": "203.0.113.7"}
    assert stack.client.post("/m/chat/flush_cache", headers=proxied).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/models", 200, ["*"]),
        ("GET", "/v1/models/nobody", 404, ["*"]),
        ("GET", "/m/nobody/v1/models", 404, ["*"]),
        ("GET", "/nope", 404, ["*"]),
        ("POST", "/v1/chat/completions", 400, ["*"]),
        ("GET", "/m/chat/model_info", 200, []),  # the engine's to give: a fake one gives none
        ("POST", "/api/v1/models/chat/sleep", 403, []),
        ("OPTIONS", "/api/v1/models/chat/sleep", 403, []),
        ("OPTIONS", "/v1/models", 200, ["*"]),
    ],
)
def test_pages_in_browsers_may_read_what_we_answer_ourselves(
    stack: Stack, method: str, path: str, status: int, allowed: list[str]
) -> None:
    page = {"origin": "http://ui.example"}
    if method == "OPTIONS":
        page["access-control-request-method"] = "POST" if "sleep" in path else "GET"
    response = stack.client.request(method, path, headers=page)
    assert (response.status_code, response.headers.get_list("access-control-allow-origin")) == (
        status,
        allowed,
    )
    if method != "OPTIONS":
        assert "access-control-allow-origin" not in stack.client.get("/v1/models").headers


# ---------------------------------------------------------------- the token path


def test_client_that_goes_away_frees_the_engine(stack: Stack) -> None:
    engine = stack.engine("chat")
    for stream in (True, False):
        tag = f"leaver {stream}"
        client = read_slowly(
            stack, {"model": "chat", "messages": HELLO, "stream": stream, "tag": tag, "hold": "never"}
        )
        engine.line(f"took {tag}")
        client.close()
        engine.line(f"gone {tag}")


def test_slow_reader_stops_its_own_answer_and_nothing_else(stack: Stack) -> None:
    engine = stack.engine("chat")
    body = {"model": "chat", "messages": HELLO, "stream": True, "tag": "slow", "count": True}
    client = read_slowly(stack, {**body, "chunks": 2000, "chunk_bytes": 65536})
    engine.line("took slow")
    engine.line("sent slow 40")  # past the window: some has gone into the kernel's buffers
    assert stack.chat("chat", tag="beside").status_code == 200
    engine.line("done beside")
    # The answer is 128 MiB; what is out is bounded by the window and the buffers of the kernel.
    sent = [line for line in engine.lines if line.startswith("sent slow")]
    resident = int(Path(f"/proc/{stack.api.process.pid}/statm").read_text().split()[1]) * 4096
    assert len(sent) < 400
    assert resident < 200 << 20
    client.close()
    engine.line("gone slow")


def test_many_clients_at_once_get_their_own_answers(stack: Stack) -> None:
    def ask(number: int) -> str:
        messages = [{"role": "user", "content": f"number {number}"}]
        answer = stack.client.post("/m/code/v1/chat/completions", json={"messages": messages}).json()
        return str(answer["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [f"code heard number {number}" for number in range(64)]


def test_undecodable_frames_are_counted_and_dropped(stack: Stack) -> None:
    context = zmq.Context()
    try:
        for address in (
            addresses.router_for_apis(stack.run_dir),
            addresses.router_for_runtimes(stack.run_dir),
        ):
            stranger = context.socket(zmq.DEALER)
            stranger.connect(address)
            stranger.send(b"nonsense")
            stranger.send_multipart([b"a", b"b"])
            stranger.close()
    finally:
        context.term()
    name = 'prism_undecodable_frames_total{process="router"}'
    wait_for("counted", lambda: stack.metric(name) == 4.0)
    assert stack.chat("chat").status_code == 200


# ---------------------------------------------------------------- other configurations


def test_queue_bound_keys_and_waking() -> None:
    server = 'max_queue = 2\napi_keys = ["client"]\nadmin_keys = ["boss"]'
    with running(("chat",), server=server, hold_wakes=True) as stack:
        engine = stack.engine("chat")
        assert stack.chat("chat").status_code == 401
        refused = stack.client.get("/v1/models", headers={"origin": "http://ui.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*")
        assert error_of(stack.client.get("/v1/models"))["code"] == "invalid_api_key"
        assert stack.client.get("/health").status_code == 200
        stack.client.headers["authorization"] = "Bearer client"
        assert stack.client.post("/api/v1/models/chat/sleep").status_code == 401
        boss = {"authorization": "Bearer boss"}
        assert stack.client.post("/api/v1/models/chat/sleep", headers=boss).status_code == 200

        # Held while it wakes, then answered; one more than the bound is told to come again.
        answers: list[httpx.Response] = []
        clients = [threading.Thread(target=lambda: answers.append(stack.chat("chat"))) for _ in range(2)]
        for client in clients:
            client.start()
        engine.line("waking 1")
        wait_for("queued", lambda: stack.metric('prism_queue_depth{model="chat"}') == 2.0)
        refused = stack.chat("chat")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert not answers
        engine.tell("release wake 1")
        for client in clients:
            client.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].headers["x-prism-model-state"] == "activated"
        # The only model needs no name.
        assert stack.client.post("/generate", json={}).status_code == 200


def test_engine_that_cannot_be_connected_to_is_told_and_nothing_is_left() -> None:
    with running(("chat", "code")) as stack:
        assert stack.chat("chat").status_code == 200
        api = stack.api.process.pid
        soft, hard = resource.prlimit(api, resource.RLIMIT_NOFILE)
        resource.prlimit(api, resource.RLIMIT_NOFILE, (3, hard))  # as if it had all that it may have
        for path, body in (("/v1/chat/completions", {"messages": HELLO}), ("/tokenize", {})):
            refused = stack.client.post(path, json={"model": "code", **body})
            assert (refused.status_code, error_of(refused)["code"]) == (503, "no_connection")
            assert "Too many open files" in error_of(refused)["message"]
            assert int(refused.headers["retry-after"]) >= 1
        assert stack.chat("chat").status_code == 200, "which has a connection"
        wait_for("given up", lambda: stack.metric('prism_inflight{model="code"}') == 0.0)
        resource.prlimit(api, resource.RLIMIT_NOFILE, (soft, hard))
        assert stack.chat("code").status_code == 200


def test_time_in_the_queue_is_counted_of_those_too_who_leave_it() -> None:
    with running(("chat",), hold_wakes=True) as stack:
        assert stack.client.post("/api/v1/models/chat/sleep").status_code == 200
        client = read_slowly(stack, {"model": "chat", "messages": HELLO})
        stack.engine("chat").line("waking 1")
        began = time.monotonic()
        wait_for("queued", lambda: stack.metric('prism_queue_depth{model="chat"}') == 1.0)
        waited_s = time.monotonic() - began
        client.close()
        name = 'prism_request_queue_seconds_{}{{model="chat"}}'
        wait_for("counted", lambda: stack.metric(name.format("count")) == 1.0)
        assert stack.metric(name.format("sum")) >= waited_s > 0.0


def test_stop_lets_answers_end() -> None:
    with running(("chat",)) as stack:
        engine = stack.engine("chat")
        answers: list[httpx.Response] = []
        held = threading.Thread(
            target=lambda: answers.append(stack.chat("chat", stream=True, tag="t", hold_after=2))
        )
        held.start()
        engine.line("holding t")
        stack.api.process.terminate()
        wait_for("no more connections", lambda: _refuses(stack))
        engine.tell("release after t")
        held.join()
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert stack.api.process.wait(10) == 0
        assert stack.router.stop() == 0


def _refuses(stack: Stack) -> bool:
    """The listener is ours too, so a connection waits; but the api_server does not answer any more."""
    try:
        return httpx.get(stack.url + "/live", timeout=0.2).status_code != 200
    except httpx.HTTPError:
        return True
