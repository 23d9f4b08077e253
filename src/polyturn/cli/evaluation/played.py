"""What a command that has played an evaluation prints: the tables of its report, and a line of JSON for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from polyturn.cli.evaluation.tables import print_report
from polyturn.cli.outcome import RUN_FAILED, print_error
from polyturn.configs.loading.suites import LoadedEntry
from polyturn.evaluations import Asked
from polyturn.rollout.evaluation.conduct import Conducted, Tally, result_of
from polyturn.rollout.evaluation.records import EvaluatedEntry


def print_played(directory: Path, asked: Asked, conducted: Conducted) -> None:
    """Print what an evaluation came to. Exits with an error where nothing of it has a score."""
    player = asked.plan.player
    print_report(conducted.report)
    results: list[dict[str, Any]] = []
    failures: list[str] = []
    for loaded, entry in zip(asked.suite.entries, conducted.evaluation.entries, strict=True):
        try:
            results.append(_result(loaded, entry, asked, conducted))
        except ValueError as error:
            failures.append(str(error))
    for failure in failures:
        print_error(failure)
    if conducted.num_left:
        typer.echo(
            f"{conducted.num_left} episodes have no score; `polyturn eval resume {directory}` plays them again"
        )
    if not results:
        raise typer.Exit(RUN_FAILED)
    whole = {
        "suite": conducted.evaluation.suite,
        "directory": str(directory),
        "model": player.model,
        "policy": player.label,
        "num_left": conducted.num_left,
        "results": results,
    }
    typer.echo(json.dumps(whole if len(asked.suite.entries) > 1 else {**results[0], **whole}))


def _result(loaded: LoadedEntry, entry: EvaluatedEntry, asked: Asked, conducted: Conducted) -> dict[str, Any]:
    """What is said of an entry. Raises `ValueError` where nothing of it has a score."""
    tally = conducted.tallies.get(entry.name, Tally())
    result = result_of(entry, policy=asked.plan.player.label, tally=tally)
    environment = loaded.config.environment
    return {
        "name": entry.name,
        "environment": environment.id,
        "options": environment.options,
        "split": entry.split,
        "model": asked.plan.player.model,
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
