"""`polyturn eval score`: stored episodes are graded again, and no policy is asked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.evaluation.tables import print_report
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides
from polyturn.configs.errors import RunFailure, as_config_error
from polyturn.evaluations import rescored_copy, shown, to_rescore
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.evaluation.conduct import report_on
from polyturn.rollout.evaluation.rescore import rescore


def score(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of an evaluation.")],
    overrides: Overrides = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Grade all episodes, into a new directory, not those alone that lack it."),
    ] = False,
    target: Annotated[
        Path | None, typer.Option("--directory", metavar="NEW", help="The new directory, where one is made.")
    ] = None,
) -> None:
    """Grade stored episodes again, without playing: those whose scorer failed, in place.

    With KEY=VALUE (reward, entries.NAME.reward, success_score) or --all, all of them are graded into a new
    directory, and DIR stays as it is (docs/evaluation.md).

    \b
    Example: polyturn eval score runs/evaluations/nq-20260101-120000 reward.kind=rule reward.name=f1
    """
    with reported():
        plan, suite = to_rescore(directory, overrides or ())
        is_copy = bool(overrides or everything or target)
        path = rescored_copy(directory, plan, suite, target) if is_copy else directory
        typer.echo(f"evaluation: {path}")
        try:
            with shown(suite) as watching, as_config_error():
                found = rescore(
                    path,
                    plan,
                    [entry.config for entry in suite.entries],
                    everything=is_copy,
                    on_begin=watching.begin,
                    on_line=watching.line,
                )
        except EngineError as failure:
            raise RunFailure(failure.sentence) from failure
        print_report(report_on(path))
        graded = {name: asdict(each) for name, each in found.items()}
        typer.echo(json.dumps({"suite": plan.suite, "directory": str(path), "graded": graded}))
