"""`polyturn view`: the page over runs, evaluations and episodes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.options import PolicyOptions, read_options
from polyturn.cli.outcome import reported
from polyturn.configs.errors import ConfigError


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
    renderer: Annotated[
        list[str] | None, typer.Option(help="ENV_ID=module:name or ENV_ID=file.py:name: shows its messages.")
    ] = None,
) -> None:
    """Show runs, evaluations and their episodes on a local web page, which only reads.

    \b
    Example: polyturn view runs
    """
    import webbrowser

    from polyturn.viewer.opening import open_viewer
    from polyturn.viewer.server import serve

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
        server = open_viewer(
            directories,
            host=host,
            port=port,
            policy_url=policy_url,
            policy_options=read_options(policy_options),
            renderers=renderer or (),
        )
        asyncio.run(serve(server, started))
