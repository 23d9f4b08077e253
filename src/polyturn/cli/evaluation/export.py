"""`polyturn eval export`: stored episodes in the formats of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.outcome import reported
from polyturn.cli.train import print_warning
from polyturn.rollout.evaluation.export import formats

Source = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="An evaluation, a run of training, or the Parquet file of one of its steps."
    ),
]


def export(
    source: Source,
    kind: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="inspect, openai, hf or atif (docs/export.md).")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="PATH", help="A file or directory that is not there yet."),
    ],
) -> None:
    """Write the episodes of an evaluation or a run for other programs to read.

    What looks like a credential is blanked. The last line is one JSON object.

    \b
    Example: polyturn eval export evaluations/games-20260101-120000 --format inspect --output games.eval
    """
    with reported():
        found = formats.export(source, kind, output, tell=print_warning)
        typer.echo(
            json.dumps(
                {
                    "format": kind,
                    "paths": [str(path) for path in found.paths],
                    "num_episodes": found.num_episodes,
                    "num_blanked": found.num_blanked,
                }
            )
        )
