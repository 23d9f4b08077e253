"""`polyturn eval compare`: how two policies compare on the tasks that both were measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer

from polyturn.cli.evaluation.report import AsJson, CoverageFloor
from polyturn.cli.evaluation.tables import print_comparison
from polyturn.cli.outcome import reported
from polyturn.configs.errors import as_config_error
from polyturn.rollout.evaluation.compare import compare as compare_evaluations
from polyturn.rollout.evaluation.directory import read_evaluation
from polyturn.rollout.evaluation.report import COVERAGE_FLOOR


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="The directory of an evaluation, to compare with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The directory of another.")],
    coverage_floor: CoverageFloor = COVERAGE_FLOOR,
    as_json: AsJson = False,
) -> None:
    """Say whether B scores higher than A: a paired test on the tasks that both were measured on.

    Prints the effect with its interval and p-value, the difference that could have been found, and the tasks that
    flipped (docs/evaluation_statistics.md).

    \b
    Example: polyturn eval compare evaluations/before evaluations/after
    """
    with reported():
        with as_config_error():
            found = compare_evaluations(read_evaluation(a), read_evaluation(b), coverage_floor=coverage_floor)
        if as_json:
            typer.echo(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        else:
            print_comparison(found)
