"""`polyturn train`."""

from __future__ import annotations

from typing import Annotated

import typer

from polyturn.cli.outcome import INTERRUPTED, RUN_FAILED, print_error, reported
from polyturn.cli.packages import require
from polyturn.cli.plan import print_plan
from polyturn.configs.loading.loader import load_config

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options that replace the recipe's.")
]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, and start nothing.")
    ] = False,
) -> None:
    """Train a policy.

    The last line printed is `run: PATH`. Ctrl-C saves; resume=true goes on.

    \b
    Example: polyturn train quickstart seed=1 trainer.optimizer.learning_rate=1e-6
    """
    from polyturn.trainer.run.preflight import preflight

    with reported():
        config = load_config(recipe, overrides or ())
        preflight(config, dry_run=dry_run, tell=_tell if dry_run else None)
        if dry_run:
            print_plan(config)
            return
        require()
        from polyturn.trainer.run.failures import FAILURES, Interrupted, sentence_of
        from polyturn.trainer.run.train import train as run

        try:
            path = run(config)
        except Interrupted as interrupted:
            typer.echo(str(interrupted))
            typer.echo(f"run: {interrupted.directory}")
            raise typer.Exit(INTERRUPTED) from interrupted
        except FAILURES as failure:
            print_error(sentence_of(failure))
            raise typer.Exit(RUN_FAILED) from failure
    typer.echo(f"run: {path}")


def _tell(note: str) -> None:
    typer.echo(f"warning: {note}", err=True)
