"""``prism-sgl replay`` and ``prism-sgl plan``: a trace on a model of the machine, or against a running server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from prism_sgl.launch.http_url import is_url
from prism_sgl.launch.replay import fleet_file, measurements, plot, trace_file
from prism_sgl.launch.replay.client import Prompts
from prism_sgl.launch.replay.live_runs import LiveRun, Target
from prism_sgl.launch.replay.runs import Run, Runner
from prism_sgl.schedulers.replay import policies

F = TypeVar("F", bound=Callable[..., Any])
N = TypeVar("N", int, float)


class _Names(click.ParamType[tuple[str, ...]]):
    name = "NAME,..."

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[str, ...]:
        names = tuple(value) if isinstance(value, tuple) else tuple(n.strip() for n in str(value).split(","))
        for name in names:
            if name not in policies.NAMES:
                self.fail(f"{name!r} is no policy; known: {', '.join(policies.NAMES)}", param, context)
        return names


class _Numbers(click.ParamType[tuple[float, ...]]):
    name = "N,..."

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[float, ...]:
        try:
            found = tuple(float(n) for n in str(value).split(","))
        except ValueError:
            found = ()
        least = 1 if self._whole else 0.01
        wrong = [n for n in found if not least <= n <= 10_000 or (self._whole and n != int(n))]
        if not found or wrong:
            kind = "whole numbers of 1 or more" if self._whole else "numbers of 0.01 or more"
            self.fail(f"{value!r} are not {kind}, e.g. 1,2,4", param, context)
        return found


class _Range(click.ParamType[tuple[int, int]]):
    name = "LOW-HIGH"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> tuple[int, int]:
        low, _, high = str(value).partition("-")
        if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
            self.fail(f"{value!r} is no range of token ids, e.g. 300-500", param, context)
        return int(low), int(high)


class _Url(click.ParamType[str]):
    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> str:
        if not is_url(str(value)):
            self.fail(f"{value!r} is no address, e.g. http://127.0.0.1:30000", param, context)
        return str(value).rstrip("/").removesuffix("/v1")


class _Costs(click.Path):
    """The name of a card whose costs come with the package, or a file."""

    name = "CARD|FILE"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Any:
        return measurements.CARDS.get(str(value)) or super().convert(value, param, context)


_POSITIVE = click.FloatRange(0.01, 10_000)


def _shared(command: F) -> F:
    path = click.Path(path_type=Path)
    for option in (
        click.option("--fleet", required=True, type=path, metavar="FILE", help="Models and devices (TOML)."),
        click.option("--trace", required=True, type=path, metavar="FILE", help="Arrivals (CSV)."),
        click.option("--policy", type=_Names(), default="prism,static,muxserve,paper", show_default=True),
        click.option(
            "--costs",
            type=_Costs(path_type=Path),
            default="h100",
            show_default=True,
            metavar="CARD|FILE",
            help=f"Measured on {' or '.join(measurements.CARDS)}, or a file of `python -m benchmarks.gpu.costs`.",
        ),
        click.option(
            "--tries", type=click.IntRange(1, 16), default=4, show_default=True, help="Tunings tried."
        ),
        click.option("--repeats", type=click.IntRange(1, 100), default=1, show_default=True),
        click.option("--json", "json_file", type=path, metavar="FILE", help="Where the numbers go."),
        click.option("--plot", "plot_file", type=path, metavar="FILE", help="Where a picture goes (PNG)."),
    ):
        command = option(command)
    return command


@click.command()
@_shared
@click.option("--rate-scale", type=_Numbers(), default="1", show_default=True, help="Each request so often.")
@click.option("--slo-scale", type=_Numbers(), default="5", show_default=True, help="Times P95 when alone.")
@click.option("--gpus", type=_Numbers(whole=True), help="Numbers of devices; else the fleet's own.")
@click.option(
    "--time-scale",
    type=_POSITIVE,
    default=1.0,
    show_default=True,
    help="Times of the trace by this; 0.5: twice as fast.",
)
@click.option("--live", type=_Url(), metavar="URL", help="Ask this running server, instead of a simulation.")
@click.option(
    "--token-ids", type=_Range(), default="1000-30000", show_default=True, help="Of --live's prompts."
)
@click.option(
    "--same-prompts", is_flag=True, help="Let --live's prompts of a model begin alike, for its cache."
)
@click.pass_context
def replay(
    context: click.Context,
    fleet: Path,
    trace: Path,
    policy: tuple[str, ...],
    costs: Path,
    tries: int,
    repeats: int,
    json_file: Path | None,
    plot_file: Path | None,
    rate_scale: tuple[float, ...],
    slo_scale: tuple[float, ...],
    gpus: tuple[float, ...] | None,
    time_scale: float,
    live: str | None,
    token_ids: tuple[int, int],
    same_prompts: bool,
) -> None:
    """Replay a trace under several policies, or against a running server, and show what clients would have seen."""
    if live is not None:
        _only_in_simulation(context, ("policy", "gpus", "tries"))
    pyplot = plot.drawer() if plot_file else None
    file = fleet_file.load(fleet, measurements.read(costs))
    times = trace_file.stretched(trace_file.load(trace), time_scale)
    runner = Runner(file, times, repeats=repeats, tries=tries)
    devices = tuple(int(n) for n in gpus) if gpus else (file.fleet.num_devices,)
    points = [(r, s, g) for g in devices for s in slo_scale for r in rate_scale]
    runs: list[Run] = []
    if live is not None:
        key = context.find_root().params.get("key")
        prompts = Prompts(*token_ids, alike=same_prompts)
        found = _run_live(Target(live, file.served, prompts, key), runner, points, repeats)
        runs, written = [one.run for one in found], [one.as_json() for one in found]
        told = {"fleet": file.fleet.name, "trace": trace.name, "live": live}
    else:
        runs = _run_simulated(runner, points, policy)
        written = [run.as_json() for run in runs]
        told = _context(file, trace, policy)
    _show(runs)
    if json_file:
        _write(json_file, {"runs": written, **told, "time_scale": time_scale})
    if plot_file and pyplot is not None:
        plot.attainment(runs, plot_file, pyplot)


def _run_simulated(
    runner: Runner, points: Sequence[tuple[float, float, int]], names: Sequence[str]
) -> list[Run]:
    runs = []
    with _progress() as progress:
        counts = [runner.num_requests(name, rate) for rate, _, _ in points for name in names]
        task = progress.add_task("", total=sum(counts))
        for rate, slo, num in points:
            for name in names:
                progress.update(task, description=f"{name} x{rate:g} on {num}")
                runs.append(runner.run(name, rate, slo, num, lambda done: progress.advance(task, done)))
    return runs


def _run_live(
    target: Target, runner: Runner, points: Sequence[tuple[float, float, int]], repeats: int
) -> list[LiveRun]:
    with _progress() as progress:
        task = progress.add_task("", total=repeats * sum(len(runner.arrivals(rate)) for rate, _, _ in points))

        def show(what: str, answers: int) -> None:
            progress.update(task, description=what, advance=answers)

        found = target.runs(runner, points, repeats, show)
    for note in dict.fromkeys(note for one in found for replay in one.replays for note in replay.notes):
        click.echo(f"note: {note}", err=True)
    for one in found:
        for reason, count in one.failures.items():
            click.echo(f"{count} failed: {reason}", err=True)
    return found


def _only_in_simulation(context: click.Context, options: Sequence[str]) -> None:
    for option in options:
        if context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--{option} is for simulations; leave it out with --live")


@click.command()
@_shared
@click.option("--rate-scale", type=_POSITIVE, default=1.0, show_default=True)
@click.option("--slo-scale", type=_POSITIVE, default=5.0, show_default=True)
@click.option("--target", type=click.FloatRange(0.01, 1.0), default=0.99, show_default=True)
@click.option("--most-gpus", type=click.IntRange(1, 1024), help="Try no more; else twice the fleet's.")
def plan(
    fleet: Path,
    trace: Path,
    policy: tuple[str, ...],
    costs: Path,
    tries: int,
    repeats: int,
    json_file: Path | None,
    plot_file: Path | None,
    rate_scale: float,
    slo_scale: float,
    target: float,
    most_gpus: int | None,
) -> None:
    """How many devices each policy needs for TARGET of the requests to be in time, and what stands where."""
    pyplot = plot.drawer() if plot_file else None
    file = fleet_file.load(fleet, measurements.read(costs))
    runner = Runner(file, trace_file.load(trace), repeats=repeats, tries=tries)
    most = most_gpus or 2 * file.fleet.num_devices
    needed: dict[str, tuple[int | None, Run]] = {}
    with _progress() as progress:
        task = progress.add_task("", total=len(policy))
        for name in policy:
            progress.update(task, description=name)
            needed[name] = runner.fewest_gpus(name, rate_scale, slo_scale, target, most)
            progress.advance(task)
    for name, (count, run) in needed.items():
        if count is None:
            click.echo(f"{name}: {most} devices reach {run.summary.ttft_attainment:.4f}, not {target:g}")
            continue
        click.echo(f"{name}: {count} devices ({run.summary.ttft_attainment:.4f})")
        for device, models in run.placement.items():
            click.echo(f"  {device}: {' '.join(models) or '-'}")
    if json_file:
        plans = [
            {"policy": name, "target": target, "gpus_needed": count, "run": run.as_json()}
            for name, (count, run) in needed.items()
        ]
        _write(json_file, {"plans": plans, **_context(file, trace, policy)})
    if plot_file and pyplot is not None:
        plot.gpus_needed({name: count for name, (count, _) in needed.items()}, plot_file, pyplot)


def _progress() -> Progress:
    """On stderr, so that what is printed can be piped."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _context(file: fleet_file.FleetFile, trace: Path, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "fleet": file.fleet.name,
        "trace": trace.name,
        "policies": {name: policies.NOTES[name] for name in names},
        "not_measured": list(file.fleet.notes),
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written ({error.strerror})") from None


def _show(runs: list[Run]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "POLICY",
        "GPUS",
        "RATE",
        "SLO",
        "TTFT MET",
        "TPOT MET",
        "P50 S",
        "P99 S",
        "FAILED",
        "MOVES",
    ):
        table.add_column(column, justify="left" if column == "POLICY" else "right")
    for run in runs:
        s = run.summary
        table.add_row(
            run.policy,
            str(run.gpus),
            f"{run.rate_scale:g}",
            f"{run.slo_scale:g}",
            f"{s.ttft_attainment:.2%}",
            f"{s.tpot_attainment:.2%}",
            f"{s.ttft_p50_s:.3f}",
            f"{s.ttft_p99_s:.3f}",
            str(s.failed),
            str(s.migrations),
        )
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
