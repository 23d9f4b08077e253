"""`polyturn eval validate`: whether a suite can be trusted, before a model plays it."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from polyturn.cli.completion import complete_recipe_or_suite
from polyturn.cli.outcome import RUN_FAILED, reported, table
from polyturn.cli.train import Overrides
from polyturn.configs.loading.suites import is_suite, load_evaluation, read_suite
from polyturn.configs.schema.suite import CheckName, SuiteEntry
from polyturn.rollout.evaluation.validate import EntryProof, Script, validate_entry

SCRIPTS: tuple[Script, ...] = ("oracle", "nothing", "random", "gold")
COUNTED: dict[CheckName, str] = {
    "duplicates": "twice",
    "other_answers": "other answer",
    "leaks": "trained on",
    "near_duplicates": "near",
    "near_leaks": "near trained",
    "answer_in_prompt": "in prompt",
}
"""The headings of the table."""


def validate(
    recipe_or_suite: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_SUITE",
            help="A YAML file, or the name of a shipped recipe or suite.",
            autocompletion=complete_recipe_or_suite,
        ),
    ],
    overrides: Overrides = None,
    num_played: Annotated[
        int, typer.Option("--tasks", metavar="N", min=1, help="Tasks of each entry that scripts play.")
    ] = 32,
) -> None:
    """Prove a suite before a model sees it; exit with 1 if it does not hold.

    Scripts play some tasks of each entry: the oracle, which must score 1, one that says nothing, the random player, and
    one that gives the right answer. All tasks are compared with each other and with those that are trained on. The last
    line is one JSON object.

    \b
    Example: polyturn eval validate games --tasks 64
    """
    with reported():
        suite = load_evaluation(recipe_or_suite, overrides or ())
        written: dict[str, SuiteEntry] = {}
        if is_suite(recipe_or_suite):
            written = {
                entry.called: entry for entry in read_suite(recipe_or_suite, overrides or ())[0].entries
            }
        proofs = []
        for loaded in suite.entries:
            entry = written.get(loaded.name)
            proofs.append(
                validate_entry(
                    loaded.name,
                    loaded.config,
                    num_played=num_played,
                    success_score=loaded.success_score,
                    has_oracle=entry is None or entry.has_oracle,
                    accepts=() if entry is None else entry.accepts,
                )
            )
            for finding in proofs[-1].findings:
                typer.echo(f"{loaded.name}: {finding.severity}: {finding.check}: {finding.sentence}")
        typer.echo(table([_HEAD, *map(_row, proofs)]))
        well = all(proof.ok for proof in proofs)
        typer.echo(f"{suite.name}: {'valid' if well else 'NOT valid'}")
        found = {"suite": suite.name, "ok": well, "entries": [_as_json(proof) for proof in proofs]}
        typer.echo(json.dumps(found))
    if not well:
        raise typer.Exit(RUN_FAILED)


_HEAD = ("entry", "split", "tasks", "played", *SCRIPTS, "training", *COUNTED.values(), "verdict")


def _row(proof: EntryProof) -> tuple[str, ...]:
    scores = (f"{proof.scores[name]:.3f}" if name in proof.scores else "-" for name in SCRIPTS)
    counts = (f"{proof.counts[check]:,}" if check in proof.counts else "-" for check in COUNTED)
    training = "-" if proof.num_training is None else f"{proof.num_training:,}"
    severities = {finding.severity for finding in proof.findings}
    verdict = "FAIL" if "fail" in severities else "look" if "look" in severities else "ok"
    return (
        proof.name,
        proof.split,
        f"{proof.num_tasks:,}",
        f"{proof.num_played:,}",
        *scores,
        training,
        *counts,
        verdict,
    )


def _as_json(proof: EntryProof) -> dict[str, object]:
    return {**dataclasses.asdict(proof), "ok": proof.ok}
