"""The table of routes against SGLang's source, which is read and not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from prism_sgl.launch.errors_http import HttpError
from prism_sgl.launch.routes import ROUTES, Kind, find

# Ask for the package's place without running it.
_SPEC = find_spec("sglang")
assert _SPEC is not None
assert _SPEC.submodule_search_locations
ENTRYPOINTS = Path(_SPEC.submodule_search_locations[0]) / "srt" / "entrypoints"
FILES = ("http_server.py", "v1_loads.py", "elastic_ep.py")
METHODS = {"get", "post", "put", "delete", "head", "patch", "websocket"}


def path_of(node: ast.expr) -> str | None:
    """The path of a route decorator: a literal, or the default of ``os.environ.get(name, default)``."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Call) and len(node.args) == 2 and isinstance(node.args[1], ast.Constant):
        return str(node.args[1].value)
    return None


def sglang_routes() -> Iterator[tuple[str, str]]:
    for name in FILES:
        for node in ast.walk(ast.parse((ENTRYPOINTS / name).read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for decorator in node.decorator_list:
                if not (isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Attribute)):
                    continue
                verb = decorator.func.attr
                if verb not in METHODS | {"api_route"} or not decorator.args:
                    continue
                path = path_of(decorator.args[0])
                if path is None:
                    continue  # a route whose name only the environment gives
                methods = [verb.upper()]
                for keyword in decorator.keywords:
                    if keyword.arg == "methods":
                        methods = list(ast.literal_eval(keyword.value))
                for method in methods:
                    yield method, path


SGLANG = sorted(set(sglang_routes()))


def test_sglangs_source_is_read() -> None:
    assert ("POST", "/v1/chat/completions") in SGLANG
    assert ("GET", "/v1/loads") in SGLANG
    assert len(SGLANG) > 90


def test_no_router_of_sglang_is_overlooked() -> None:
    source = (ENTRYPOINTS / "http_server.py").read_text()
    assert source.count("include_router(") == len(FILES) - 1
    assert "app.mount(" not in source
    assert "add_api_route(" not in source


@pytest.mark.parametrize(("method", "path"), SGLANG, ids=lambda value: str(value))
def test_every_route_of_sglang_is_in_the_table(method: str, path: str) -> None:
    route, _ = find(method, path.replace("{", "").replace("}", "").replace(":path", ""))
    assert path in (route.path, route.path.replace(":path", ""))


def test_nothing_is_passed_that_changes_weights_or_memory() -> None:
    words = ("weights", "memory_occupation", "pause", "continue", "lora", "hicache", "state")
    for route in ROUTES:
        if any(word in route.path for word in words):
            assert route.kind is Kind.REFUSED, route.path
            assert route.reason


def test_health_is_never_a_models_business() -> None:
    for path in ("/health", "/health_generate", "/ping", "/ready", "/live"):
        assert find("GET", path)[0].kind is Kind.OURS


def test_verbs_find_their_model_even_with_slashes() -> None:
    route, params = find("POST", "/api/v1/models/org/chat/sleep")
    assert (route.path, params) == ("/api/v1/models/{model:path}/sleep", {"model": "org/chat"})
    route, params = find("GET", "/api/v1/models/org/chat")
    assert (route.kind, params) == (Kind.OURS, {"model": "org/chat"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/generate", 405), ("DELETE", "/v1/models", 405), ("POST", "/", 405)],
)
def test_unknown_routes_and_methods_are_refused(method: str, path: str, status: int) -> None:
    with pytest.raises(HttpError) as caught:
        find(method, path)
    assert caught.value.status == status
