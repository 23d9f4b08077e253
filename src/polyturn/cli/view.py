"""`polyturn view`: the page over runs, evaluations and episodes."""

from __future__ import annotations

import asyncio
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from polyturn.cli.options import PolicyOptions, read_options
from polyturn.cli.outcome import reported
from polyturn.configs.errors import ConfigError
from polyturn.tools.plain import printable


def view(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Runs, evaluations, or folders that hold some; without any, ./runs or this folder."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 0,
    host: Annotated[
        str, typer.Option(help="The address to listen on; by default this machine alone.")
    ] = "127.0.0.1",
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    policy_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible endpoint, up to and with /v1, that plays turns on."),
    ] = None,
    policy_options: PolicyOptions = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write the page with its data to one file, and end."),
    ] = None,
    steps: Annotated[
        str, typer.Option(metavar="FROM:TO", help="Of an export: the steps that go into it.")
    ] = ":",
    episodes: Annotated[int, typer.Option(min=0, help="Of an export: at most so many of each run.")] = 200,
    megabytes: Annotated[int, typer.Option(min=1, help="Of an export: at most so large.")] = 32,
    renderer: Annotated[
        list[str] | None, typer.Option(help="ENV_ID=module:name or ENV_ID=file.py:name: shows its messages.")
    ] = None,
) -> None:
    """Show runs, evaluations and their episodes on a local web page, which only reads.

    \b
    Example: polyturn view runs
    """

    def started(url: str) -> None:
        typer.echo(f"viewer at {url}")
        if open_page:
            webbrowser.open(url)

    with reported():
        directories = list(runs or [Path("runs") if Path("runs").is_dir() else Path()])
        missing = next((path for path in directories if not path.is_dir()), None)
        if missing is not None:
            raise ConfigError(
                f"command line: there is no directory {missing}; name a run or a folder of runs"
            )
        if export is not None:
            first, last = _step_range(steps)
            _export(
                directories,
                export,
                renderers=renderer or (),
                first_step=first,
                last_step=last,
                num_episodes=episodes,
                max_bytes=megabytes * 1_000_000,
            )
            return
        from polyturn.viewer.opening import open_viewer
        from polyturn.viewer.server import serve

        server = open_viewer(
            directories,
            host=host,
            port=port,
            policy_url=policy_url,
            policy_options=read_options(policy_options),
            renderers=renderer or (),
        )
        asyncio.run(serve(server, started))


def _step_range(text: str) -> tuple[int, int]:
    """The first and the last step of `3:5`, `3:`, `:5` or `3`. Raises ConfigError."""
    first, colon, last = text.partition(":")
    if not all(part == "" or (part.isascii() and part.isdigit()) for part in (first, last)):
        raise ConfigError(f"command line: --steps is written FROM:TO, such as 3:5, 3: or 3, not '{text}'")
    low = int(first) if first else 0
    return low, int(last) if last else (2**53 if colon else low)


def _export(directories: Sequence[Path], target: Path, *, renderers: Sequence[str], **choice: Any) -> None:
    from polyturn.viewer.export import ExportChoice, export_page
    from polyturn.viewer.opening import open_answers

    if not target.parent.is_dir():
        raise ConfigError(f"command line: --export: there is no directory {target.parent}")
    answers = open_answers(directories, renderers=renderers)
    for sentence in export_page(answers, target, ExportChoice(**choice)):
        typer.echo(f"left out: {printable(sentence)}")
    typer.echo(f"page: {target}")
