"""The command line against a real HTTP server that answers as ours does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prism_sgl.errors import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, EXIT_TEMPFAIL, EXIT_UNAVAILABLE, EXIT_USAGE
from prism_sgl.launch.cli import cli
from tests.launch.instance import free_port
from tests.model_folders import write_model

MODELS = [
    {"name": "chat", "state": "awake", "device": "host0", "weights_bytes": 258 << 20, "kv_bytes": 64 << 20}
    | {"queued": 3, "reason": ""},
    {"name": "org/code", "state": "failed", "device": None, "weights_bytes": 0, "kv_bytes": 0, "queued": 0}
    | {"reason": "exit code 1: RuntimeError: no [such] layer"},
    {"name": "spare", "state": "cold", "device": None, "weights_bytes": 0, "kv_bytes": 0, "queued": 0},
]


class _Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]]
    foreign: tuple[int, object] | None = None  # what a server answers that is not ours

    def do_GET(self) -> None:
        if self.foreign is not None:
            self._answer(*self.foreign)
        elif self.path.endswith("/explain"):
            self._answer(200, {"message": "chat: awake on host0\nhost0: pressure 0.10"})
        else:
            self._answer(200, {"models": MODELS})

    def do_POST(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        if self.foreign is not None:
            self._answer(*self.foreign)
            return
        if "nobody" in self.path:
            self._answer(404, {"error": {"message": "no model nobody; ask /v1/models"}})
        elif "busy" in self.path:
            self._answer(503, {"error": {"message": "busy is draining"}})
        else:
            self._answer(200, {"message": "chat: slept in 0.02 s"})

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    _Handler.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        monkeypatch.setenv("PRISM_HOST", f"127.0.0.1:{running.server_port}")
        yield running
        running.shutdown()
        thread.join()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_move_and_explain_ask_the_server(server: ThreadingHTTPServer) -> None:
    assert call("move", "org/code", "host1").output == "chat: slept in 0.02 s\n"
    assert [path for path, _ in _Handler.asked] == ["/api/v1/models/org/code/move?device=host1"]
    assert call("explain", "chat").output == "chat: awake on host0\nhost0: pressure 0.10\n"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "http://127.0.0.1"])
def test_proxy_is_not_asked_for_this_host(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert call("--host", f"{host}:{server.server_port}", "ps").exit_code == EXIT_OK
    elsewhere = call("--host", "models.example:30000", "ps")
    assert elsewhere.exit_code == EXIT_UNAVAILABLE
    assert "Connection refused" in elsewhere.output, "by the proxy, which is asked for others"


def test_list_shows_every_model_and_why_one_failed(server: ThreadingHTTPServer) -> None:
    result = call("list")
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == ["NAME", "STATE", "DEVICE", "WEIGHTS", "KV", "QUEUED"]
    assert lines[1] == ["chat", "awake", "host0", "258MiB", "64MiB", "3"]
    assert lines[3] == ["spare", "cold", "-", "0B", "0B", "0"]
    assert "org/code: exit code 1: RuntimeError: no [such] layer" in result.output


def test_ps_leaves_out_what_has_no_engine(server: ThreadingHTTPServer) -> None:
    assert "spare" not in call("ps").output


def test_json_is_for_programs(server: ThreadingHTTPServer) -> None:
    assert json.loads(call("list", "--json").output) == MODELS


@pytest.mark.parametrize("verb", ["sleep", "wake", "load", "unload"])
def test_verbs_ask_the_server(server: ThreadingHTTPServer, verb: str) -> None:
    result = call("--key", "secret", verb, "org/code")
    assert (result.exit_code, result.output) == (EXIT_OK, "chat: slept in 0.02 s\n")
    assert _Handler.asked == [(f"/api/v1/models/org/code/{verb}", "Bearer secret")]


def test_exit_codes(server: ThreadingHTTPServer) -> None:
    refused, later = call("wake", "nobody"), call("wake", "busy")
    assert (refused.exit_code, refused.output) == (EXIT_FAILURE, "Error: no model nobody; ask /v1/models\n")
    assert (later.exit_code, later.output) == (EXIT_TEMPFAIL, "Error: busy is draining\n")
    assert call("no-such-verb").exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "foreign",
    [
        (301, {}),
        (200, "<html>"),
        (200, {"status": "ok"}),
        (200, {"message": 7, "models": "many"}),
        (404, {"detail": "Not Found"}),
        (502, "<html>"),
    ],
)
def test_answer_of_another_server_is_no_success(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, foreign: tuple[int, object]
) -> None:
    monkeypatch.setattr(_Handler, "foreign", foreign)
    url = f"http://127.0.0.1:{server.server_port}/api/v1/models"
    for words in (["ps"], ["list", "--json"], ["unload", "chat"], ["explain", "chat"]):
        result = call(*words)
        assert result.exit_code == EXIT_UNAVAILABLE
        assert result.output.startswith(f"Error: no prism_sgl server there: something else answered {url}")
        assert "PRISM_HOST" in result.output


@pytest.mark.parametrize(
    "host", ["127.0.0.1:abc", "::1", "http://[::1", "127.0.0.1:99999", "ftp://a", "a\nb"]
)
def test_host_that_is_no_address_is_told(host: str) -> None:
    result = call("--host", host, "ps")
    assert result.exit_code == EXIT_USAGE
    assert f"{host!r} is no address, e.g. 127.0.0.1:30000 or [::1]:30000" in result.output


@pytest.mark.parametrize("key", ["schlüssel", "secret\r", "secret\n", " secret", "sec\x1bret"])
def test_key_that_cannot_be_sent_is_told_and_not_shown(server: ThreadingHTTPServer, key: str) -> None:
    for result in (call("--key", key, "ps"), CliRunner().invoke(cli, ["ps"], env={"PRISM_ADMIN_KEY": key})):
        assert result.exit_code == EXIT_USAGE
        assert "leave out line ends" in result.output
        assert "ret" not in result.output and "schl" not in result.output
    assert call("--key", "two words", "wake", "chat").exit_code == EXIT_OK


def test_unreachable_server_is_69_with_a_remedy() -> None:
    result = call("--host", f"127.0.0.1:{free_port()}", "ps")
    assert result.exit_code == EXIT_UNAVAILABLE
    assert "start a server or set PRISM_HOST" in result.output


def test_check_says_what_is_wrong(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", weights_bytes=2, layers=1, kv_heads=1, head_dim=2, context=2)
    file = tmp_path / "models.toml"
    file.write_text(
        f'[[devices]]\nname = "d"\nkind = "host"\nmemory = "1GiB"\n[models.chat]\npath = "{model}"\n'
    )
    right = call("check", str(file))
    assert (right.exit_code, right.output) == (EXIT_OK, f"{file} is right: chat at http://127.0.0.1:30000\n")
    file.write_text(file.read_text().replace(f"{model}", "models/my--model"))
    no_model = call("check", str(file))
    assert no_model.exit_code == EXIT_CONFIG
    told = (
        f'{file}: models.chat.path is "models/my--model", which does not exist and is no id of the hub; give'
    )
    assert no_model.stderr.startswith(told)
    file.write_text("[sever]\n")
    wrong = call("serve", "--config", str(file))
    assert (wrong.exit_code, wrong.stderr) == (
        EXIT_CONFIG,
        f"{file}: sever is not a known key; did you mean server?\n",
    )
