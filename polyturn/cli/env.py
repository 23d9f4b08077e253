"""`polyturn env`: see the environments, and play one."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import typer

from polyturn.cli.outcome import reported
from polyturn.cli.plan import table
from polyturn.configs.errors import ConfigError
from polyturn.configs.yaml_tree import read_value
from polyturn.envs.registry import list_environments, make
from polyturn.envs.tool_env import ToolEnv

app = typer.Typer(help="List, show and play environments.", no_args_is_help=True, rich_markup_mode=None)

EnvId = Annotated[str, typer.Argument(metavar="ID", help="As `polyturn env list` shows it.")]
Options = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Arguments of the environment's constructor."),
]


@app.command("list")
def list_() -> None:
    """List the registered environments, those of installed packages included.

    \b
    Example: polyturn env list
    """
    typer.echo(table([(info.env_id, info.description) for info in list_environments()]))


@app.command()
def show(env_id: EnvId, options: Options = None) -> None:
    """Show an environment's tools, options, splits and a first observation.

    \b
    Example: polyturn env show polyturn/TwoHopSearch-v0
    """
    with reported():
        env = make_environment(env_id, options)
        info = next(found for found in list_environments() if found.env_id == env.env_id)
        typer.echo(f"{info.env_id}\n{info.description}\n{info.entry_point}\n")
        typer.echo("options:")
        typer.echo(table([(f"  {name}", default) for name, default in _constructor(env)]))
        typer.echo("\ntasks:")
        typer.echo(table([(f"  {split}", size) for split, size in _splits(env)]))
        typer.echo("\ntools:")
        for tool in env.tools:
            typer.echo(json.dumps(tool.to_openai()["function"], indent=2))
        observation, _ = env.reset(seed=0)
        typer.echo("\na first observation:")
        for message in observation:
            typer.echo(f"[{message['role']}] {message['content']}")
        env.close()


def make_environment(env_id: str, options: list[str] | None) -> ToolEnv:
    """The environment with `key=value` arguments. Raises ConfigError."""
    arguments: dict[str, Any] = {}
    for option in options or ():
        key, equals, text = option.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"command line: '{option}' is not of the form key=value")
        arguments[key] = read_value(text, "command line", key).plain()
    try:
        return make(env_id, **arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _constructor(env: ToolEnv) -> list[tuple[str, str]]:
    parameters = inspect.signature(type(env)).parameters.values()
    return [
        (p.name, "required" if p.default is p.empty else f"default {p.default!r}")
        for p in parameters
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _splits(env: ToolEnv) -> list[tuple[str, str]]:
    """The usual splits that the environment has, with their sizes."""
    rows = []
    for split in ("train", "validation", "heldout", "test"):
        try:
            rows.append((split, f"{len(env.tasks(split)):,}"))
        except ValueError:
            continue
    return rows
