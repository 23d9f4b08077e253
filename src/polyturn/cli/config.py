"""`polyturn config`: see the options and what a recipe comes to."""

from __future__ import annotations

import json

import typer

from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, Recipe
from polyturn.configs.loading.loader import dump_config, json_schema, load_config
from polyturn.configs.schema.reference import options_markdown

app = typer.Typer(
    help="Show options: a recipe's, or all.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def show(recipe: Recipe, overrides: Overrides = None) -> None:
    """Print the resolved config as YAML.

    \b
    Example: polyturn config show quickstart trainer.num_steps=5
    """
    with reported():
        typer.echo(dump_config(load_config(recipe, overrides or ())), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    \b
    Example: polyturn config schema > recipe.schema.json
    """
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def options() -> None:
    """Print every option with its type, default and meaning, as Markdown tables.

    \b
    Example: polyturn config options
    """
    typer.echo(options_markdown(), nl=False)
