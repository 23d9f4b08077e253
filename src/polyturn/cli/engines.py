"""`polyturn engines`: which engines a run has that is under way, and more or fewer of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer

from polyturn.cli.completion import complete_run
from polyturn.cli.outcome import reported, table
from polyturn.configs.errors import ConfigError, RunFailure
from polyturn.rollout.engines.requests import AddEngine, EngineRequest, RemoveEngine, ask

app = typer.Typer(help="The engines of a run that is under way.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.", autocompletion=complete_run)]
Timeout = Annotated[float, typer.Option("--timeout-s", help="How long the run has to answer.", min=1)]


@app.command("list")
def list_engines(run: Run) -> None:
    """Show the engines of a run, what they do and which version of the weights they serve.

    \b
    Example: polyturn engines list runs/quickstart-20260131-120000
    """
    with reported():
        path = _standing(run)
        try:
            engines = orjson.loads(path.read_bytes())["engines"]
        except (OSError, orjson.JSONDecodeError, KeyError) as error:
            raise ConfigError(
                f"{path} cannot be read: it is there once the engines of a run are up"
            ) from error
        rows = [("engine", "state", "version", "address")]
        rows += [
            (
                str(one["engine"]),
                one["state"],
                "" if one["version"] is None else str(one["version"]),
                one["url"],
            )
            for one in engines
        ]
        typer.echo(table(rows))


@app.command("add")
def add(run: Run, timeout_s: Timeout = 30.0) -> None:
    """Start one engine more for a run; it is asked as soon as it has the weights.

    \b
    Example: polyturn engines add runs/quickstart-20260131-120000
    """
    _ask(run, AddEngine(), timeout_s)


@app.command("remove")
def remove(
    run: Run,
    number: Annotated[int, typer.Argument(help="As `list` shows it.", min=0)],
    timeout_s: Timeout = 30.0,
) -> None:
    """Have an engine end what it has under way, and leave; its episodes go on elsewhere.

    \b
    Example: polyturn engines remove runs/quickstart-20260131-120000 1
    """
    _ask(run, RemoveEngine(number=number), timeout_s)


def _standing(run: Path) -> Path:
    return run / "logs" / "engines.json"


def _ask(run: Path, request: EngineRequest, timeout_s: float) -> None:
    with reported():
        if not _standing(run).exists():
            raise ConfigError(f"there is no {_standing(run)}: {run} is no run whose engines are up")
        try:
            typer.echo(ask(run, request, timeout_s=timeout_s))
        except TimeoutError as error:
            raise RunFailure(f"{error}; is it under way?") from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
