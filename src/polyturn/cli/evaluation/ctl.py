"""`polyturn eval ctl`: an evaluation that is being played is paused, gone on with, and retuned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from polyturn.cli.outcome import RUN_FAILED, print_error, reported
from polyturn.configs.errors import ConfigError, as_config_error, did_you_mean
from polyturn.configs.loading.yaml_tree import read_value
from polyturn.rollout.evaluation.control import Request, ask
from polyturn.rollout.evaluation.directory import read_plan

Kind = Literal["pause", "resume", "requeue", "set", "status"]


def ctl(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of an evaluation.")],
    what: Annotated[str, typer.Argument(metavar="WHAT", help="pause, resume, requeue, set or status.")],
    setting: Annotated[
        str | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Of set: max_concurrent_episodes, max_retries, max_failure_share, or of a budget max_tokens, "
            "max_cost, max_seconds, of one entry as ENTRY.max_cost.",
        ),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="How long to wait for an answer.")
    ] = 30.0,
) -> None:
    """Pause, go on with, retune or ask a running evaluation; requeue plays its errored episodes again.

    What is done is written to changes.jsonl in the directory.

    \b
    Example: polyturn eval ctl runs/evaluations/two-hop-20260101-120000 set max_concurrent_episodes=16
    """
    with reported():
        request = _request(what, setting)
        with as_config_error():
            read_plan(directory)
            try:
                answer = ask(directory, request, timeout_s=timeout_s)
            except TimeoutError as error:
                print_error(error)
                raise typer.Exit(RUN_FAILED) from error
        typer.echo(answer.get("done") or json.dumps(answer))


def _request(what: str, setting: str | None) -> Request:
    """What is asked for. Raises ConfigError."""
    kinds = get_args(Kind)
    if what not in kinds:
        raise ConfigError(f"there is no '{what}'{did_you_mean(what, kinds)}; there are {', '.join(kinds)}")
    if (setting is not None) != (what == "set"):
        raise ConfigError("KEY=VALUE belongs to set, as in `set max_concurrent_episodes=16`")
    if setting is None:
        return Request(kind=cast(Kind, what))
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: '{setting}' is not of the form key=value")
    return Request(kind="set", key=key, value=read_value(text, "command line", key).plain())
