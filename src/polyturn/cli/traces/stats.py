"""`polyturn traces stats`: what stored episodes come to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

import orjson
import typer

from polyturn.cli.outcome import reported
from polyturn.cli.traces import wanted
from polyturn.cli.traces.curves import overview_lines, overview_of
from polyturn.cli.traces.paper import Paper, bar, columns, one_line, put
from polyturn.configs.errors import ConfigError, as_config_error
from polyturn.rollout.traces.selection import selected
from polyturn.rollout.traces.statistics import (
    COLUMNS,
    GROUPINGS,
    Bin,
    Summary,
    summarize,
    summarize_by,
    tool_usage,
)
from polyturn.tools.plain import printable_json
from polyturn.tools.types import ToolUsage

BAR_WIDTH = 40
NAME_WIDTH = 40


def stats(
    directory: wanted.Directory,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="NAME", help=f"A row for each {', '.join(GROUPINGS)}."),
    ] = None,
    parts: wanted.Parts = None,
    step: wanted.Steps = None,
    episode: wanted.Episode = None,
    task: wanted.TaskId = None,
    environment: wanted.Environment = None,
    outcome: wanted.OutcomeName = None,
    reward: wanted.RewardRange = None,
    tool: wanted.ToolName = None,
    as_json: wanted.AsJson = False,
    no_pager: wanted.NoPager = False,
    color: wanted.Colour = "auto",
) -> None:
    """Sum episodes up: rewards, outcomes, lengths, times and tools; and of a run the overview of its figures.

    \b
    Example: polyturn traces stats runs/quickstart-20260131-120000 --by step
    """
    with reported():
        files = wanted.open_files(directory)
        paper = Paper.of_terminal(color)
        if by is not None and by not in GROUPINGS:
            raise ConfigError(f"--by: '{by}' is none of {', '.join(GROUPINGS)}")
        chosen = wanted.selection(
            files,
            parts=parts,
            steps=step,
            reward=reward,
            episode=episode,
            task=task,
            environment=environment,
            outcome=outcome,
            tool=tool,
        )
        with as_config_error():
            table = selected(files, chosen, (*COLUMNS, "tools", *([GROUPINGS[by]] if by else ())))
        whole, tools = summarize(table), tool_usage(table["tools"])
        rows = summarize_by(table, by) if by else []
        overview = overview_of(files.directory)
        if as_json:
            value = asdict(whole) | {
                "overview": {name: list(by_step.items()) for name, by_step in overview.items()},
                "parts": list(chosen.parts or files.usual_parts),
                "tools": {name: asdict(usage) for name, usage in tools.items()},
                "by": by,
                "rows": [asdict(row) for row in rows],
            }
            typer.echo(printable_json(orjson.dumps(value).decode()))
        else:
            searched = chosen.parts or files.usual_parts
            lines = stats_lines(whole, tools, by, rows, paper, searched, files.parts)
            lines = itertools.chain(lines, overview_lines(overview, paper))
            put(lines, paged=not no_pager, is_coloured=paper.is_coloured)
        wanted.print_damage(files)


def stats_lines(
    whole: Summary,
    tools: Mapping[str, ToolUsage],
    by: str | None,
    rows: Sequence[Summary],
    paper: Paper,
    searched: Sequence[str],
    parts: Sequence[str],
) -> Iterator[str]:
    """All over, histogram, reasons, tools, and the table of the grouping."""
    beside = [part for part in parts if part not in searched]
    also = f"; also stored: {', '.join(one_line(part, NAME_WIDTH) for part in beside)}" if beside else ""
    yield f"{whole.num_episodes:,} episodes of {', '.join(one_line(part, NAME_WIDTH) for part in searched)}{also}"
    if not whole.num_episodes:
        return
    yield ""
    yield from columns(
        [
            ("", "mean", "median", "95 %", "largest"),
            *(
                (name, *(_number(value) for value in (one.mean, one.p50, one.p95, one.largest)))
                for name, one in (
                    ("reward", whole.reward),
                    ("turns", whole.turns),
                    ("tokens", whole.tokens),
                    ("seconds", whole.seconds),
                )
            ),
        ],
        right=range(1, 5),
    )
    yield f"\n{paper.ink('reward', bold=True)}"
    yield from _bars([(_ends(one), one.count) for one in whole.rewards], paper, "green")
    yield f"\n{paper.ink('how they ended', bold=True)}"
    yield from _bars(list(whole.stop_reasons.items()), paper, "blue")
    if tools:
        yield f"\n{paper.ink('tools', bold=True)}"
        yield from columns(
            [TOOL_HEAD, *(_tool_row(name, usage) for name, usage in tools.items())], right=range(1, 7)
        )
    if by is not None:
        yield ""
        yield from columns([(by, *ROW_HEAD), *(_row(row) for row in rows)], right=range(1, 1 + len(ROW_HEAD)))


TOOL_HEAD = ("tool", "calls", "failed", "timed out", "cut", "seconds a call", "slowest")
ROW_HEAD = (
    "episodes",
    "reward",
    "completed",
    "truncated",
    "failed",
    "turns",
    "tokens",
    "tool errors",
    "seconds",
)


def _tool_row(name: str, usage: ToolUsage) -> tuple[str, ...]:
    counts = (usage.num_calls, usage.num_failures, usage.num_timeouts, usage.num_truncated)
    return (
        one_line(name, NAME_WIDTH),
        *(f"{count:,}" for count in counts),
        f"{usage.mean_seconds:.3f}",
        f"{usage.max_seconds:.3f}",
    )


def _row(row: Summary) -> tuple[str, ...]:
    outcomes = (row.outcomes.get(name, 0) / row.num_episodes for name in ("completed", "truncated", "failed"))
    errors = row.num_tool_errors / row.num_tool_calls if row.num_tool_calls else None
    return (
        one_line(row.name, NAME_WIDTH),
        f"{row.num_episodes:,}",
        _number(row.reward.mean),
        *(f"{share:.0%}" for share in outcomes),
        _number(row.turns.mean),
        _number(row.tokens.mean),
        "" if errors is None else f"{errors:.1%}",
        _number(row.seconds.mean),
    )


def _bars(rows: Sequence[tuple[str, int]], paper: Paper, colour: str) -> Iterator[str]:
    total = sum(count for _, count in rows)
    cells = [
        (one_line(name, NAME_WIDTH), f"{count:,}", f"{count / total:.1%}", bar(count / total, BAR_WIDTH))
        for name, count in rows
    ]
    for line in columns(cells, right=(1, 2)):
        text = line.rstrip("█▏▎▍▌▋▊▉")
        yield text + paper.ink(line[len(text) :], colour)


def _ends(one: Bin) -> str:
    return f"{one.low:g}" if one.low == one.high else f"{one.low:.3g} to {one.high:.3g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
