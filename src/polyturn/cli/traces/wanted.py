"""Options by which episodes are chosen, and the directory that they are in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.completion import complete_environment, complete_run
from polyturn.configs.errors import as_config_error
from polyturn.rollout.traces.files import TraceFiles
from polyturn.rollout.traces.selection import Pattern, Range, Selection

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIRECTORY",
        help="Of a run or an evaluation.",
        autocompletion=complete_run,
    ),
]
Parts = Annotated[
    list[str] | None, typer.Option("--in", metavar="PART", help="evaluation/NAME, an entry; or `all`.")
]
Steps = Annotated[str | None, typer.Option("--step", metavar="RANGE", help="3, 3:7 or 3:")]
Episode = Annotated[
    str | None, typer.Option("--episode", metavar="ID", help="The beginning of its id, or its group's.")
]
TaskId = Annotated[str | None, typer.Option("--task", metavar="ID")]
Environment = Annotated[
    str | None, typer.Option("--environment", metavar="ID", autocompletion=complete_environment)
]
OutcomeName = Annotated[
    str | None,
    typer.Option("--outcome", metavar="NAME", help="An outcome, a stop reason, dropped or tool_error."),
]
RewardRange = Annotated[str | None, typer.Option("--reward", metavar="RANGE", help="1, 0.5:1, 0.5: or :0")]
ToolName = Annotated[str | None, typer.Option("--tool", metavar="NAME", help="That was called.")]
IsRegex = Annotated[bool, typer.Option("--regex", help="The text is a regular expression.")]
AsJson = Annotated[bool, typer.Option("--json", help="A JSON object a line, for programs.")]
NoPager = Annotated[bool, typer.Option("--no-pager", help="Print at once.")]
Colour = Annotated[str, typer.Option("--color", metavar="WHEN", help="auto, always or never.")]

DROPPED = "dropped"
"""In place of an outcome: attempts that failed or were set aside."""
TOOL_ERROR = "tool_error"
"""In place of an outcome: episodes with a call that failed."""


def open_files(directory: Path) -> TraceFiles:
    """The stored episodes of a directory. Raises ConfigError where there are none."""
    with as_config_error():
        return TraceFiles(directory)


def selection(
    files: TraceFiles,
    *,
    parts: Sequence[str] | None,
    steps: str | None,
    reward: str | None,
    text: str | None = None,
    is_regex: bool = False,
    episode: str | None = None,
    task: str | None = None,
    environment: str | None = None,
    outcome: str | None = None,
    tool: str | None = None,
) -> Selection:
    """What the options ask for. Raises ConfigError for a range that is none."""
    dropped, tool_errors = outcome == DROPPED, outcome == TOOL_ERROR
    if parts and "all" in parts:
        parts = files.parts
    elif dropped and not parts:
        parts = [part for part in files.parts if not part.startswith("evaluation/")]
    with as_config_error("--step: "):
        step_range = None if steps is None else Range.read(steps)
    with as_config_error("--reward: "):
        reward_range = None if reward is None else Range.read(reward)
    return Selection(
        parts=tuple(parts) if parts else None,
        steps=step_range,
        episode=episode,
        task=task,
        environment=environment,
        outcome=None if dropped or tool_errors else outcome,
        reward=reward_range,
        tool=tool,
        tool_errors=tool_errors,
        dropped=dropped,
        pattern=None if text is None else Pattern(text=text, is_regex=is_regex),
    )


def print_damage(files: TraceFiles) -> None:
    """What could not be read, behind what could."""
    for sentence in files.damage:
        typer.echo(f"warning: {sentence}", err=True)
