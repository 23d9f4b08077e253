"""`polyturn probe`: how difficult the tasks of a recipe are for a policy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from polyturn import runs
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, Recipe, print_warning


def probe(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[
        Path, typer.Option("--output", help="A JSONL file; tasks that it has are not played again.")
    ] = Path("difficulties.jsonl"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="A Hugging Face directory or builtin:NAME; without it model.path of the recipe.",
        ),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", min=1, help="The first so many tasks; without it all.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Episodes of each task.")] = 8,
) -> None:
    """Play each training task some times and write its success rate.

    curriculum.difficulties=FILE begins a run with them. The last line is one JSON object.

    \b
    Example: polyturn probe quickstart --tasks 64 --samples 4 --output difficulties.jsonl
    """
    with reported():
        result = runs.probe(
            recipe,
            *overrides or (),
            output=output,
            model_path=model,
            num_tasks=tasks,
            samples_per_task=samples,
            on_warning=print_warning,
        )
        typer.echo(
            f"{output}: {result.num_tasks} tasks, of which {result.never} were never solved, {result.sometimes} "
            f"sometimes and {result.always} always; {result.num_unknown} could not be played"
        )
        typer.echo(json.dumps({"output": str(output), **asdict(result)}))
