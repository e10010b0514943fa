"""The command line of a running server: what it serves, and sleep, wake, load, unload, move by hand."""

from __future__ import annotations

import json
from typing import Any, TypeVar
from urllib.parse import quote

import click
import httpx
from rich.console import Console
from rich.table import Table

from prism_sgl import config
from prism_sgl.errors import EXIT_FAILURE, EXIT_OK, EXIT_TEMPFAIL, EXIT_UNAVAILABLE, PrismError
from prism_sgl.launch.__main__ import main as launch
from prism_sgl.launch.http_url import is_url, mounts
from prism_sgl.launch.replay.commands import plan, replay
from prism_sgl.units import show_size

T = TypeVar("T")

_READ_TIMEOUT_S = 10.0
_VERB_TIMEOUT_S = 900.0  # a load pays the engine's start
_COLUMNS = ("NAME", "STATE", "DEVICE", "WEIGHTS", "KV", "QUEUED")

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_model = click.argument("model")


class _UnreachableError(click.ClickException):
    exit_code = EXIT_UNAVAILABLE


class _TryLaterError(click.ClickException):
    exit_code = EXIT_TEMPFAIL


class _RefusedError(click.ClickException):
    exit_code = EXIT_FAILURE


def _check_key(context: click.Context, param: click.Parameter, key: str | None) -> str | None:
    # Here, because httpx would show the key in its error.
    if key and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise click.BadParameter("not shown; leave out line ends, spaces around it and what is not ASCII")
    return key


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", envvar="PRISM_HOST", help="Address of the server.  [default: 127.0.0.1:30000]")
@click.option(
    "--key", envvar="PRISM_ADMIN_KEY", callback=_check_key, help="Admin key, if the server has some."
)
@click.pass_context
def cli(context: click.Context, host: str | None, key: str | None) -> None:
    """Many LLMs on few devices."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def client(timeout_s: float) -> httpx.Client:
        url = config.server_address(host)
        if not is_url(url):
            raise click.UsageError(
                f"--host (or PRISM_HOST) {host!r} is no address, e.g. 127.0.0.1:30000 or [::1]:30000"
            )
        return httpx.Client(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            mounts=mounts(url),
        )

    context.obj = client


@cli.command()
@click.option("--config", "file", required=True, metavar="FILE", help="The models.toml.")
@click.option("--check", is_flag=True, help="Only say whether the file is right.")
@click.pass_context
def serve(context: click.Context, file: str, check: bool) -> None:
    """Serve the models of a models.toml (python -m prism_sgl.launch)."""
    context.exit(launch(["--config", file, *(["--check"] if check else [])]))


@cli.command()
@click.argument("file", metavar="CONFIG")
@click.pass_context
def check(context: click.Context, file: str) -> None:
    """Say whether a models.toml is right; exit code 78 if not."""
    context.exit(launch(["--config", file, "--check"]))


cli.add_command(replay)
cli.add_command(plan)


@cli.command()
@_as_json
@click.pass_context
def ps(context: click.Context, as_json: bool) -> None:
    """Show the models that have an engine, and what each holds."""
    models = [model for model in _fetch_models(context) if model.get("state") != "cold"]
    _show_models(models, as_json)


@cli.command("list")
@_as_json
@click.pass_context
def list_models(context: click.Context, as_json: bool) -> None:
    """Show all configured models."""
    _show_models(_fetch_models(context), as_json)


@cli.command()
@_model
@click.pass_context
def sleep(context: click.Context, model: str) -> None:
    """Give the device memory of MODEL to others; its next request wakes it."""
    _ask(context, model, "sleep")


@cli.command()
@_model
@click.pass_context
def wake(context: click.Context, model: str) -> None:
    """Wake MODEL now."""
    _ask(context, model, "wake")


@cli.command()
@_model
@click.pass_context
def load(context: click.Context, model: str) -> None:
    """Start the engine of MODEL."""
    _ask(context, model, "load")


@cli.command()
@_model
@click.pass_context
def unload(context: click.Context, model: str) -> None:
    """End the engine of MODEL."""
    _ask(context, model, "unload")


@cli.command()
@_model
@click.argument("device")
@click.pass_context
def move(context: click.Context, model: str, device: str) -> None:
    """Serve MODEL on DEVICE; it goes on being served meanwhile."""
    _ask(context, model, f"move?device={quote(device, safe='')}")


@cli.command()
@_model
@click.pass_context
def explain(context: click.Context, model: str) -> None:
    """Say where MODEL is and why, and what would have to change to move it."""
    _ask(context, model, "explain", method="GET")


def _fetch_models(context: click.Context) -> list[dict[str, Any]]:
    models = _request(context, "GET", "/api/v1/models", _READ_TIMEOUT_S, "models", list)
    return [model for model in models if isinstance(model, dict)]


def _ask(context: click.Context, model: str, verb: str, method: str = "POST") -> None:
    path = f"/api/v1/models/{quote(model)}/{verb}"
    message = _request(context, method, path, _VERB_TIMEOUT_S, "message", str)
    click.echo(message or f"{model}: {verb} done")


def _request(context: click.Context, method: str, path: str, timeout_s: float, key: str, kind: type[T]) -> T:
    """What our server's answer has at ``key``; anybody else's answer is an error, whatever its status."""
    with context.obj(timeout_s) as client:
        try:
            response = client.request(method, path)
        except httpx.HTTPError as error:
            message = f"{client.base_url} cannot be reached ({error}); start a server or set PRISM_HOST"
            raise _UnreachableError(message) from None
    try:
        content = response.json()
    except ValueError:
        content = {}
    if not isinstance(content, dict):
        content = {}
    refusal = content.get("error")
    if response.is_error and isinstance(refusal, dict) and refusal.get("message"):
        message = str(refusal["message"])
        raise _TryLaterError(message) if response.status_code in (429, 503) else _RefusedError(message)
    found = content.get(key)
    if not response.is_success or not isinstance(found, kind):
        raise _UnreachableError(
            f"no prism_sgl server there: something else answered {response.url} with {response.status_code}; "
            "give the server's address by --host or PRISM_HOST"
        )
    return found


def _show_models(models: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(models, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in ("WEIGHTS", "KV", "QUEUED") else "left")
    for model in models:
        table.add_row(
            str(model.get("name", model.get("id", ""))),
            str(model.get("state", "")),
            str(model.get("device") or "-"),
            show_size(int(model.get("weights_bytes", 0))),
            show_size(int(model.get("kv_bytes", 0))),
            str(model.get("queued", 0)),
        )
    console = Console(width=None if Console().is_terminal else 200)  # a pipe has no width to fit in
    console.print(table)
    for model in models:
        if model.get("state") == "failed" and model.get("reason"):
            console.print(f"{model['name']}: {model['reason']}", markup=False, highlight=False)


def main() -> int:
    """The console script ``prism-sgl``."""
    try:
        cli(prog_name="prism-sgl")
    except PrismError as error:
        click.echo(str(error), err=True)
        return error.exit_code
    return EXIT_OK
