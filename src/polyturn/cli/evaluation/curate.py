"""`polyturn eval curate`: what passed, as rows to fine-tune on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.evaluation.export import Source
from polyturn.cli.outcome import reported
from polyturn.cli.train import print_warning
from polyturn.configs.errors import ConfigError
from polyturn.rollout.evaluation.curate import Choice
from polyturn.rollout.evaluation.curate import curate as run


def curate(
    source: Source,
    output: Annotated[
        Path, typer.Option("--output", metavar="FILE", help="A JSONL file that is not there yet.")
    ],
    per_task: Annotated[
        int, typer.Option("--per-task", min=0, help="Keep the best so many of each task; 0: all.")
    ] = 1,
    min_score: Annotated[
        float | None,
        typer.Option("--min-score", help="The least score; without it what the suite calls a success, or 1."),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option("--balance", help="Keep as many of each environment as of the one with the fewest."),
    ] = False,
) -> None:
    """Choose episodes that passed and write them as rows for `polyturn sft`.

    Says how many were not kept, and why. The last line is one JSON object.

    \b
    Example: polyturn eval curate evaluations/games-20260101-120000 --output rows.jsonl --per-task 2
    """
    with reported():
        choice = Choice(per_task=per_task or None, min_score=min_score, balance=balance)
        found = run(source, output, choice, tell=print_warning)
        for reason, number in found.dropped.items():
            if number:
                typer.echo(f"not kept: {number:,}, each {reason}")
        if not found.num_rows:
            raise ConfigError(
                f"{source}: none of {found.num_dropped:,} episodes is kept, for the reasons above; play more, or "
                "choose otherwise (--min-score)"
            )
        typer.echo(
            json.dumps(
                {
                    "path": str(output),
                    "num_rows": found.num_rows,
                    "num_with_tokens": found.num_with_tokens,
                    "by_environment": found.by_environment,
                    "dropped": found.dropped,
                }
            )
        )
