"""`polyturn sft`: supervised fine-tuning on conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polyturn import runs
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, Recipe, print_plan, print_warning
from polyturn.trainer.run.preflight import preflight


def sft(
    recipe: Recipe,
    overrides: Overrides = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", metavar="FILE", help="Rows to train on, JSONL (docs/fine_tuning.md); may be repeated."
        ),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option("--heldout", metavar="FILE", help="Rows whose loss is measured; may be repeated."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, every row too, print what would run, start nothing."
        ),
    ] = False,
) -> None:
    """Fine-tune a recipe's policy on conversations: the loss is on the assistant's turns.

    Prints `run: PATH` last; PATH/policy is what `polyturn train model.path=` and `polyturn eval run --model` take.
    Ctrl-C saves; resume=true goes on.

    \b
    Example: polyturn sft quickstart --data rows.jsonl supervised.epochs=2 trainer.optimizer.learning_rate=1e-5
    """
    with reported():
        options: dict[str, Any] = {}
        if data:
            options["data"] = data
        if heldout:
            options["heldout"] = heldout
        given = {"supervised": {name: [str(path) for path in paths] for name, paths in options.items()}}
        if dry_run:
            config, _ = runs.fine_tuning(recipe, *overrides or (), on_message=print_message, **given)
            for warning in preflight(config, dry_run=True):
                print_warning(warning)
            print_plan(config)
            return
        path = runs.fine_tune(recipe, *overrides or (), on_warning=print_message, **given)
    typer.echo(f"run: {path}")


def print_message(sentence: str) -> None:
    typer.echo(sentence, err=True)
