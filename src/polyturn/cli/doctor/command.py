"""`polyturn doctor`: whether this machine can do what is wanted of it, and what to do where it cannot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer

import polyturn
from polyturn import __version__
from polyturn.cli.completion import complete_recipe
from polyturn.cli.doctor.facts import read_facts
from polyturn.cli.doctor.findings import Finding, Status, Wants, findings
from polyturn.cli.outcome import reported
from polyturn.cli.train import Overrides
from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.run import RunConfig
from polyturn.tools.plain import printable, printable_json
from polyturn.tools.secrets import blank_credentials
from polyturn.trainer.run.preflight import preflight

USUAL_OUTPUT = Path("runs")
COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}


def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="What is to run here: the machine is judged by it.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Look at this machine: what is installed, what it has, what is missing, and the next step.

    Exits with 1 when what is wanted cannot run: training at all, or the recipe.

    \b
    Example: polyturn doctor quickstart trainer.parallel.data=2
    """
    with reported():
        config = None if recipe is None else polyturn.load_config(recipe, *overrides or ())
        wants = Wants(
            gpus=config is not None and "cuda" in (config.engines.device, config.trainer.device),
        )
        found = findings(read_facts(config.output_dir if config is not None else USUAL_OUTPUT), wants)
        if config is not None:
            found += _by_recipe(config)
        ready = all(finding.status is not Status.FAIL for finding in found)
        if as_json:
            value = {
                "polyturn": __version__,
                "recipe": recipe,
                "ready": ready,
                "findings": [asdict(one) for one in found],
            }
            typer.echo(printable_json(orjson.dumps(value).decode()))
        else:
            _print(found)
            typer.echo(_verdict(found, recipe))
    if not ready:
        raise typer.Exit(1)


def _by_recipe(config: RunConfig) -> list[Finding]:
    """What a run of it would be refused for, and warned of: its files, ports, memory, GPUs, environment, model."""
    try:
        warnings = preflight(config)
    except ConfigError as error:
        sentence = blank_credentials(str(error)).partition("\n")[0]
        what, _, step = sentence.rpartition("; ")
        step = step if what else "docs/configuration.md has every option"
        return [Finding(name="recipe", status=Status.FAIL, what=what or sentence, next_step=step)]
    warned = [
        Finding(name="recipe", status=Status.WARN, what=warning, next_step="it runs all the same")
        for warning in warnings
    ]
    return warned or [Finding(name="recipe", status=Status.OK, what=f"{config.name} can run here")]


def _print(found: list[Finding]) -> None:
    width = max(len(finding.name) for finding in found)
    for finding in found:
        status = typer.style(f"{finding.status:<4}", fg=COLOURS[finding.status])
        typer.echo(f"{status}  {finding.name:<{width}}  {printable(finding.what)}")
        if finding.next_step:
            typer.echo(f"      {'':<{width}}  → {printable(finding.next_step)}")


def _verdict(found: list[Finding], recipe: str | None) -> str:
    failed = [finding.name for finding in found if finding.status is Status.FAIL]
    what = "train" if recipe is None else f"run {recipe}"
    if failed:
        return f"\nnot ready to {what}: {', '.join(failed)}"
    return f"\nready to {what}"
