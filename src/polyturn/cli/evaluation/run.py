"""`polyturn eval run`: a policy plays a suite, or the held-out tasks of a recipe."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

import polyturn
from polyturn.cli.options import PolicyName, PolicyOptions, read_options
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, print_warning
from polyturn.configs.loading.loader import is_suite
from polyturn.configs.models import resolve_model_path
from polyturn.runs import EvaluationReport


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
    policy: PolicyName = "model",
    policy_options: PolicyOptions = None,
) -> None:
    """Score a policy on held-out tasks: a model, or one that is named.

    Prints the mean with its 95 % interval; the last line is one JSON object.

    \b
    Example: polyturn eval run quickstart --model runs/quickstart-20260101-120000/policy evaluation.num_tasks=64
    """
    with reported():
        reports = polyturn.evaluate(
            recipe_or_suite,
            *overrides or (),
            model_path=None if model is None else resolve_model_path(model, key="--model"),
            policy=policy,
            policy_options=read_options(policy_options),
            on_warning=print_warning,
            on_report=_print_report,
        )
        results = [_as_json(report) for report in reports]
        whole = {"suite": recipe_or_suite, "model": results[0]["model"], "results": results}
        if reports[0].result.policy != "model":
            typer.echo(f"policy: {reports[0].result.policy}")
        if reports[0].model_path is not None:
            typer.echo(f"model: {reports[0].model_path}")
        typer.echo(json.dumps(whole if is_suite(recipe_or_suite) else results[0]))


def _print_report(report: EvaluationReport) -> None:
    options, result = f" {report.options}" if report.options else "", report.result
    typer.echo(
        f"{report.environment}{options} [{report.split}]: mean reward {result.mean:.3f}, 95 % interval "
        f"{result.low:.3f} to {result.high:.3f}, {result.num_tasks} tasks, {result.num_failed} failed episodes"
    )


def _as_json(report: EvaluationReport) -> dict[str, Any]:
    result = report.result
    return {
        "environment": report.environment,
        "options": report.options,
        "split": report.split,
        "model": None if report.model_path is None else str(report.model_path),
        "policy": result.policy,
        "mean": result.mean,
        "low": result.low,
        "high": result.high,
        "num_tasks": result.num_tasks,
        "num_episodes": result.num_episodes,
        "num_failed": result.num_failed,
        "metrics": dict(result.metrics),
        "user_fault_share": result.user_fault_share,
        "num_user_faults": result.num_user_faults,
    }
