"""`polyturn eval report`: what an evaluation came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.evaluation.tables import print_report
from polyturn.cli.outcome import reported
from polyturn.configs.errors import as_config_error
from polyturn.rollout.evaluation.directory import read_evaluation
from polyturn.rollout.evaluation.report import COVERAGE_FLOOR, report_of
from polyturn.rollout.evaluation.report_files import report_json, write_report

CoverageFloor = Annotated[
    float,
    typer.Option(
        "--coverage-floor",
        min=0.0,
        max=1.0,
        help="The share of the asked episodes that must have a score for a verdict.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of an evaluation.")],
    coverage_floor: CoverageFloor = COVERAGE_FLOOR,
    as_json: AsJson = False,
) -> None:
    """Print scores with intervals and coverage, what was spent, and what failed.

    Writes report.json, and episodes.parquet with a row for each episode, into DIR. An evaluation that is being played
    is reported as far as it has got (docs/evaluation_statistics.md).

    \b
    Example: polyturn eval report evaluations/smoke-20260101-120000
    """
    with reported():
        with as_config_error():
            evaluation = read_evaluation(directory)
        found = report_of(evaluation, coverage_floor=coverage_floor)
        write_report(directory, evaluation, found)
        if as_json:
            typer.echo(report_json(found).decode(), nl=False)
        else:
            print_report(found)
