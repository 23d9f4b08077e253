"""`polyturn traces search`: which stored episodes there are, and where in them a text stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import orjson
import pyarrow as pa
import typer

from polyturn.cli.outcome import reported
from polyturn.cli.traces import wanted
from polyturn.cli.traces.paper import Paper, one_line, put
from polyturn.configs.errors import ConfigError
from polyturn.rollout.traces.files import TraceFiles
from polyturn.rollout.traces.selection import Match, Selection, select
from polyturn.tools.plain import printable, printable_json

COLUMNS = (
    "part",
    "step",
    "episode_id",
    "group_id",
    "env_id",
    "task_id",
    "state",
    "outcome",
    "stop_reason",
    "reward",
    "advantage",
    "num_turns",
    "num_tool_calls",
    "num_tool_errors",
    "num_drawn_tokens",
    "total_s",
    "error",
)
SORTED_BY = {
    "reward": "reward",
    "advantage": "advantage",
    "turns": "num_turns",
    "calls": "num_tool_calls",
    "tokens": "num_drawn_tokens",
    "seconds": "total_s",
}
MATCHES_SHOWN = 3
"""Of one episode, where not all are asked for."""

Row = Mapping[str, Any]


def search(
    directory: wanted.Directory,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="In what was said, thought, called or answered.")
    ] = None,
    parts: wanted.Parts = None,
    step: wanted.Steps = None,
    episode: wanted.Episode = None,
    task: wanted.TaskId = None,
    environment: wanted.Environment = None,
    outcome: wanted.OutcomeName = None,
    reward: wanted.RewardRange = None,
    tool: wanted.ToolName = None,
    regex: wanted.IsRegex = False,
    context: Annotated[int, typer.Option("--context", help="Characters round what is found.", min=0)] = 60,
    full: Annotated[bool, typer.Option("--full", help="Every place of each episode.")] = False,
    sort: Annotated[
        str | None, typer.Option("--sort", metavar="NAME", help="reward, turns …; -reward: falling.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="So many episodes; 0 for all.", min=0)] = 100,
    as_json: wanted.AsJson = False,
    no_pager: wanted.NoPager = False,
    color: wanted.Colour = "auto",
) -> None:
    """List episodes, with the places where a text stands.

    \b
    Example: polyturn traces search runs/quickstart-20260131-120000 "no results" --tool search --sort reward
    """
    with reported():
        files = wanted.open_files(directory)
        paper = Paper.of_terminal(color)
        chosen = wanted.selection(
            files,
            parts=parts,
            steps=step,
            reward=reward,
            text=text,
            is_regex=regex,
            episode=episode,
            task=task,
            environment=environment,
            outcome=outcome,
            tool=tool,
        )
        found = _found(files, chosen, sort)
        shown = found if not limit else _first(found, limit, say=not as_json)
        if as_json:
            lines: Iterable[str] = (_as_json(row, matches, context) for row, matches in shown)
        else:
            most = None if full else MATCHES_SHOWN
            lines = (
                line for row, matches in shown for line in episode_lines(row, matches, paper, context, most)
            )
        put(lines, paged=not (no_pager or as_json), is_coloured=paper.is_coloured)
        wanted.print_damage(files)


def _found(files: TraceFiles, chosen: Selection, sort: str | None) -> Iterator[tuple[Row, Sequence[Match]]]:
    """The episodes in the order of the files, as they are found, or sorted. Raises ConfigError."""
    name = (sort or "").removeprefix("-")
    if sort is not None and name not in SORTED_BY:
        raise ConfigError(f"--sort: '{name}' is none of {', '.join(SORTED_BY)}")
    try:
        batches = select(files, chosen, COLUMNS)
        if sort is None:
            for table, matches in batches:
                for row in table.to_pylist():
                    yield row, matches.get(row["episode_id"], ())
            return
        tables: list[pa.Table] = []
        where: dict[str, Sequence[Match]] = {}
        for table, matches in batches:
            tables.append(table)
            where.update(matches)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not tables:
        return
    order = "descending" if sort.startswith("-") else "ascending"
    for batch in pa.concat_tables(tables).sort_by([(SORTED_BY[name], order)]).to_batches():
        for row in batch.to_pylist():
            yield row, where.get(row["episode_id"], ())


def _first(
    found: Iterator[tuple[Row, Sequence[Match]]], limit: int, *, say: bool
) -> Iterator[tuple[Row, Sequence[Match]]]:
    for number, one in enumerate(found):
        if number == limit:
            if say:
                typer.echo(f"the first {limit}; --limit 0 shows all", err=True)
            return
        yield one


def episode_lines(
    row: Row, matches: Sequence[Match], paper: Paper, context: int, most: int | None
) -> Iterator[str]:
    """One line for an episode, and one for each place where the text stands."""
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:g}"
    head = (
        f"{paper.ink(printable(row['episode_id']), bold=True)}  {printable(row['part'])}  step {row['step']}  "
        f"{paper.ink(reward, _colour_of(row['reward']))}  {row['outcome']} ({printable(row['stop_reason'])})  "
        f"{row['num_turns']} turns  {row['num_tool_calls']} calls"
    )
    if row["num_tool_errors"]:
        head += f" ({row['num_tool_errors']} errors)"
    yield f"{head}  task {printable(row['task_id'])}"
    if row["error"] and not matches:
        sentence = row["error"].partition("\n")[0]
        yield f"    {paper.ink(one_line(sentence, paper.width - 4), 'red')}"
    for match in matches[:most]:
        yield f"    {_place(match)}: {_excerpt(match, context, paper)}"
    if most is not None and len(matches) > most:
        yield paper.ink(f"    … {len(matches) - most} more places; --full shows them", dim=True)


def _colour_of(reward: float | None) -> str | None:
    if reward is None:
        return "red"
    return "green" if reward > 0 else None


def _place(match: Match) -> str:
    if match.where == "error":
        return "error"
    return printable(f"[{match.message}] {match.role} {match.where}")


def _excerpt(match: Match, context: int, paper: Paper) -> str:
    before, inside, after = _around(match, context)
    return (
        f"{_flat(before)}{paper.ink(_flat(inside), 'red', bold=True) if paper.is_coloured else f'«{_flat(inside)}»'}"
        f"{_flat(after)}"
    )


def _around(match: Match, context: int) -> tuple[str, str, str]:
    begin, end = max(0, match.start - context), match.end + context
    before = ("…" if begin else "") + match.text[begin : match.start]
    after = match.text[match.end : end] + ("…" if end < len(match.text) else "")
    return before, match.text[match.start : match.end], after


def _flat(text: str) -> str:
    return printable(text.replace("\n", "⏎ ").replace("\t", " "))


def _as_json(row: Row, matches: Sequence[Match], context: int) -> str:
    places = [
        {
            "message": match.message,
            "where": match.where,
            "role": match.role,
            "start": match.start,
            "end": match.end,
            "excerpt": "".join(_around(match, context)),
        }
        for match in matches
    ]
    return printable_json(orjson.dumps({name: row[name] for name in COLUMNS} | {"matches": places}).decode())
