"""`polyturn env check`: the conformance kit, in a process that can be killed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from polyturn.cli.env_options import Options, read_options
from polyturn.cli.outcome import RUN_FAILED, print_error, reported
from polyturn.configs.errors import ConfigError
from polyturn.envs.conformance import CHECKS, Unavailable
from polyturn.envs.conformance.isolated import check_isolated
from polyturn.envs.registry import find, list_environments

_WIDTH = max(len(name) for name in CHECKS)


def check(
    env_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="The environment to check.")] = None,
    options: Options = None,
    every: Annotated[bool, typer.Option("--all", help="Check all that are registered.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--check", metavar="NAME", help="This check alone.")
    ] = None,
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds a check may take.")] = 120.0,
    num_tasks: Annotated[int, typer.Option(min=1, help="Tasks of each split to play.")] = 8,
    num_episodes: Annotated[int, typer.Option(min=2, help="Episodes to play at once.")] = 1000,
    budget_s: Annotated[float, typer.Option(min=0.1, help="How long to go on repeating episodes.")] = 5.0,
) -> None:
    """Check that an environment keeps its promises; exit with 1 if it does not.

    \b
    Example: polyturn env check polyturn/TwoHopSearch-v0
    """
    with reported():
        if every == (env_id is not None):
            raise ConfigError("command line: name one environment, or write --all")
        for name in only or ():
            if name not in CHECKS:
                raise ConfigError(f"command line: there is no check '{name}'{_nearest(name)}")
        arguments = read_options(options)
        limits: dict[str, Any] = {
            "checks": only,
            "deadline_s": deadline_s,
            "num_tasks": num_tasks,
            "num_episodes": num_episodes,
            "budget_s": budget_s,
        }
        if env_id is not None:
            failed = not _check_one(_known(env_id), arguments, limits, alone=True)
        else:
            results = [_check_one(i.env_id, {}, limits, alone=False) for i in list_environments()]
            failed = False in results
            unchecked = results.count(None)
            typer.echo(
                f"{results.count(True)} of {len(results)} environments pass"
                + (f", {unchecked} could not be checked here" if unchecked else "")
            )
    if failed:
        raise typer.Exit(RUN_FAILED)


def _known(env_id: str) -> str:
    try:
        return find(env_id).env_id
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_one(env_id: str, options: dict[str, Any], limits: dict[str, Any], *, alone: bool) -> bool | None:
    """Print the findings as they come; whether all are well, or None where nothing can be said.

    Raises ConfigError for options that the environment does not take, where it is checked alone.
    """
    typer.echo(env_id)
    failed = count = 0
    try:
        for finding in check_isolated(env_id, options, **limits):
            count += 1
            failed += not finding.ok
            result = "ok" if finding.ok else "FAIL"
            typer.echo(
                f"  {finding.check:<{_WIDTH}}  {result:<4}  {finding.seconds:6.2f} s  {finding.message}"
            )
    except Unavailable as reason:
        typer.echo(f"  not checked here: {reason}\n")
        return None
    except ValueError as error:
        if alone:
            raise ConfigError(str(error)) from error
        print_error(error)
        return False
    typer.echo(f"  {failed} of {count} checks failed\n" if failed else f"  all {count} checks passed\n")
    return not failed


def _nearest(name: str) -> str:
    matches: Sequence[str] = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.4)
    return f"; did you mean '{matches[0]}'?" if matches else f"; the checks are {', '.join(CHECKS)}"
