"""`polyturn eval list`: the suites that ship, and what has to be got for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from polyturn.cli.outcome import reported, table
from polyturn.configs.loading.loader import shipped_names
from polyturn.configs.loading.suites import missing_needs, read_suite
from polyturn.configs.schema.suite import SuiteConfig, SuiteEntry


def list_suites(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the files are looked for that suites need.")
    ] = None,
) -> None:
    """List the shipped suites: what they play, and what has to be got first. The last line is one JSON object.

    \b
    Example: polyturn eval list --data ~/data
    """
    with reported():
        overrides = [] if data is None else [f"data={json.dumps(str(data))}"]
        suites = [read_suite(name, overrides)[0] for name in shipped_names("suite")]
        for suite in suites:
            typer.echo(f"{suite.name}: {suite.about}")
            typer.echo(_indented(table(_rows(suite))) + "\n")
        typer.echo(json.dumps({"suites": [_as_json(suite) for suite in suites]}))


def _rows(suite: SuiteConfig) -> list[tuple[str, ...]]:
    return [
        (
            entry.called,
            entry.environment.id,
            entry.evaluation.split,
            f"{entry.evaluation.num_tasks:,} x {entry.evaluation.samples_per_task}",
            _needs(entry, suite.data),
        )
        for entry in suite.entries
    ]


def _needs(entry: SuiteEntry, data: Path) -> str:
    """What is still to be got, or that all is there."""
    missing = [need for need in missing_needs(entry, data) if need.required]
    if missing:
        return " ".join(f"{data / (need.file or '')}: {need.get}" for need in missing)
    return "its files are there" if any(need.required and need.file for need in entry.needs) else "nothing"


def _as_json(suite: SuiteConfig) -> dict[str, Any]:
    return {
        "name": suite.name,
        "about": suite.about,
        "entries": [
            {
                "name": entry.called,
                "environment": entry.environment.id,
                "split": entry.evaluation.split,
                "num_tasks": entry.evaluation.num_tasks,
                "samples_per_task": entry.evaluation.samples_per_task,
                "needs": [need.model_dump() for need in entry.needs],
                "missing": [need.file for need in missing_needs(entry, suite.data) if need.required],
            }
            for entry in suite.entries
        ],
    }


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
