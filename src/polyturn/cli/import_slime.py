"""`polyturn import-slime`: a launch script of slime as a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.outcome import reported
from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.configs.loading import yaml_tree
from polyturn.configs.loading.loader import load_config
from polyturn.configs.slime.recipe import recipe_of
from polyturn.configs.slime.script import read_script


def import_slime(
    script: Annotated[Path, typer.Argument(metavar="RUN.SH", help="A launch script of slime's.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the recipe goes; by default beside, NAME.yaml.")
    ] = None,
) -> None:
    """Turn a launch script of slime into a recipe, and say what was left out and why. The script is read, not run.

    \b
    Example: polyturn import-slime scripts/run-qwen3-4B.sh --output qwen3_4b.yaml
    """
    with reported():
        target = output or script.with_suffix(".yaml")
        if target.exists():
            raise ConfigError(f"{target} is there already; name another --output")
        with as_config_error():
            imported = recipe_of(read_script(script), name=script.stem.replace(".", "_"))
        for option, why in imported.left_out:
            typer.echo(f"left out: {option}: {why}")
        target.write_text(f"# From {script.name}.\n{yaml_tree.write(imported.recipe)}", encoding="utf-8")
        problems = []
        try:
            load_config(target)
        except ConfigError as error:
            problems = str(error).splitlines()
        for problem in problems:
            typer.echo(f"to do: {problem}")
        typer.echo(f"wrote {target}; now: polyturn {imported.command} {target} --dry-run")
        typer.echo(
            json.dumps({"recipe": str(target), "left_out": dict(imported.left_out), "to_do": problems})
        )
