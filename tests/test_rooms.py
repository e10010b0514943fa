"""Who may import whom (docs/design.md, "Rooms"): read from the source, so that no import has to run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "prism_sgl"
ROOMS = ("allocator", "schedulers", "engine", "launch")
MAY_IMPORT = {
    "root": set(),
    "allocator": {"root"},
    "schedulers": {"root"},
    "engine": {"root", "allocator"},
    "launch": {"root", "schedulers", "allocator"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in ROOMS else "root"


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all imported modules, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} - {"prism_sgl"} - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if path == PACKAGE / "__main__.py":  # the console script stands above the rooms
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "prism_sgl":
            other = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "root"
            assert other == room or other in MAY_IMPORT[room], f"{room} imports {name}"


ALLOWED_AT_THE_ROOT = {"frame_socket.py": {"zmq"}, "model_files.py": {"msgspec", "huggingface_hub"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_rooms(path: Path) -> None:
    room, names = room_of(path), foreign(path)
    if room == "schedulers":
        assert names <= {"msgspec"}, "schedulers know the standard library and messages only"
    if room == "root":
        assert names <= ALLOWED_AT_THE_ROOT.get(path.name, {"msgspec"})
    if room != "engine":
        assert not names & {"sglang", "torch", "transformers"}
    if room == "allocator":
        assert not names & {"zmq", "starlette", "uvicorn"}
    if path.name != "cuda_calls.py":
        assert "cuda" not in names


def test_launch_takes_nothing_of_the_allocator_but_the_ledger() -> None:
    for path in (PACKAGE / "launch").rglob("*.py"):
        for name in imports(path):
            if name.startswith("prism_sgl.allocator"):
                assert name.startswith("prism_sgl.allocator.ledger"), f"{path.name} imports {name}"


def test_schedulers_have_no_clock_threads_sockets_or_files() -> None:
    for path in (PACKAGE / "schedulers").rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & {"time", "threading", "socket", "asyncio", "os", "pathlib", "subprocess"}, path.name


def test_only_config_reads_the_environment_outside_the_engine() -> None:
    for path in SOURCES:
        if room_of(path) == "engine" or path.name in {"config.py", "standby.py"}:
            continue  # launch/standby.py hands the whole environment on to children
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"environ", "getenv"}, f"{path.name} reads the environment"
