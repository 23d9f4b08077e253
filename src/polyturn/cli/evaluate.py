"""`polyturn eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from polyturn.cli.outcome import RUN_FAILED, print_error, reported
from polyturn.cli.packages import SERVING, require
from polyturn.cli.train import Overrides
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import is_suite, load_config, load_suite
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig


def evaluate(
    recipe_or_suite: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_SUITE", help="A YAML file, or the name of a shipped recipe or suite."
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="PATH",
            help="A Hugging Face directory or builtin:NAME; without it the newest finished run's policy.",
        ),
    ] = None,
) -> None:
    """Score a policy on held-out tasks.

    Prints the mean with its 95 % interval; the last line is one JSON object.

    \b
    Example: polyturn eval quickstart --model runs/quickstart-20260101-120000/policy evaluation.num_tasks=64
    """
    from polyturn.trainer.run.preflight import preflight_evaluation

    with reported():
        suite = is_suite(recipe_or_suite)
        if suite:
            configs = load_suite(recipe_or_suite, overrides or ())
        else:
            configs = [load_config(recipe_or_suite, overrides or ())]
        model_path = (
            resolve_model_path(model, key="--model") if model is not None else newest_policy(configs[0])
        )
        for config in configs:
            preflight_evaluation(config, model_path=model_path)
        require(SERVING)
        typer.echo(f"model: {model_path}")
        results = [_evaluate_one(config, model_path) for config in configs]
    summary = (
        {"suite": recipe_or_suite, "model": str(model_path), "results": results} if suite else results[0]
    )
    typer.echo(json.dumps(summary))


def _evaluate_one(config: RunConfig, model_path: Path) -> dict[str, Any]:
    """Evaluate on one environment, print a line about it, and return its figures."""
    from polyturn.rollout.collector import RolloutError
    from polyturn.rollout.engines.process import EngineError
    from polyturn.rollout.evaluation import evaluate_model
    from polyturn.trainer.run.progress import make_progress

    settings = config.evaluation
    progress = make_progress(config.logging.progress, num_steps=1)
    progress.phase("held-out evaluation", total=settings.num_tasks * settings.samples_per_task)
    try:
        result = evaluate_model(config, model_path=model_path, on_episode=lambda _: progress.advance())
    except EngineError as failure:
        print_error(failure.sentence)
        raise typer.Exit(RUN_FAILED) from failure
    except RolloutError as failure:
        print_error(failure)
        raise typer.Exit(RUN_FAILED) from failure
    finally:
        progress.close()
    options = f" {config.environment.options}" if config.environment.options else ""
    typer.echo(
        f"{config.environment.id}{options} [{settings.split}]: mean reward {result.mean:.3f}, 95 % interval "
        f"{result.low:.3f} to {result.high:.3f}, {result.num_tasks} tasks, {result.num_failed} failed episodes"
    )
    return {
        "environment": config.environment.id,
        "options": config.environment.options,
        "split": settings.split,
        "model": str(model_path),
        "mean": result.mean,
        "low": result.low,
        "high": result.high,
        "num_tasks": result.num_tasks,
        "num_episodes": result.num_episodes,
        "num_failed": result.num_failed,
    }


def newest_policy(config: RunConfig) -> Path:
    """The final policy of `run_dir`, or of the newest finished run of this name. Raises ConfigError."""
    from polyturn.trainer.run.directory import runs_of

    if config.run_dir is not None:
        runs = [config.run_dir]
    else:
        runs = runs_of(config.name, config.output_dir)
    for run in runs:
        if (run / "policy" / "config.json").is_file():
            return run / "policy"
    where = config.run_dir or config.output_dir
    raise ConfigError(
        f"there is no finished run of '{config.name}' in {where}; name a model with --model PATH"
    )
