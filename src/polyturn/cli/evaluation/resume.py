"""`polyturn eval resume`: what an evaluation lacks is played."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.evaluation.played import print_played
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides, print_warning
from polyturn.evaluations import play, shown, to_resume


def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of an evaluation.")],
    overrides: Overrides = None,
) -> None:
    """Play what an evaluation lacks: episodes that are missing or errored, and no others.

    KEY=VALUE may change where engines run, and nothing that decides the result: that is refused, as is a task file or
    a model that is not what it was (docs/evaluation.md).

    \b
    Example: polyturn eval resume runs/evaluations/two-hop-20260101-120000 engines.num_engines=4
    """
    with reported():
        with to_resume(directory, overrides or (), on_warning=print_warning) as evaluation:
            with shown(evaluation.suite) as watching:
                conducted = play(directory, evaluation, watching, grades_first=True)
        print_played(directory, evaluation, conducted)
