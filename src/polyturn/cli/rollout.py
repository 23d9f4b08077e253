"""`polyturn rollout`: the episodes of a recipe's steps, played and stored without training."""

from __future__ import annotations

import typer

from polyturn import runs
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, Recipe, print_warning


def rollout(recipe: Recipe, overrides: Overrides = None) -> None:
    """Play the episodes of a recipe's steps with the weights as they are, and store them.

    The last line printed is `run: PATH`, which `polyturn train --replay PATH` trains on. Ctrl-C saves; resume=true goes
    on.

    \b
    Example: polyturn rollout quickstart trainer.num_steps=5
    """
    with reported():
        path = runs.roll_out(recipe, *overrides or (), on_warning=print_warning)
    typer.echo(f"run: {path}")
