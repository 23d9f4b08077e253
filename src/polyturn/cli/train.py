"""`polyturn train`."""

from __future__ import annotations

from typing import Annotated

import typer

from polyturn.cli.outcome import INTERRUPTED, RUN_FAILED, print_error, reported
from polyturn.cli.packages import require
from polyturn.cli.plan import print_plan
from polyturn.configs.loader import load_config

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
    from polyturn.trainer.preflight import preflight

    with reported():
        config = load_config(recipe, overrides or ())
        preflight(config, dry_run=dry_run)
        if dry_run:
            print_plan(config)
            return
        require()
        from ray.exceptions import RayError

        from polyturn.rollout.collector import RolloutError
        from polyturn.rollout.engines.process import EngineError
        from polyturn.trainer import run
        from polyturn.trainer.checks import CheckFailure
        from polyturn.trainer.megatron.checkpoints.manifest import CheckpointError
        from polyturn.trainer.weight_sync.publisher import WeightSyncError

        try:
            path = run.train(config)
        except run.Interrupted as interrupted:
            typer.echo(str(interrupted))
            typer.echo(f"run: {interrupted.directory}")
            raise typer.Exit(INTERRUPTED) from interrupted
        except (
            CheckFailure,
            CheckpointError,
            EngineError,
            RolloutError,
            WeightSyncError,
            FloatingPointError,
            RayError,
        ) as failure:
            print_error(failure)
            raise typer.Exit(RUN_FAILED) from failure
    typer.echo(f"run: {path}")
