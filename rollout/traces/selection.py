"""Which of the stored episodes are wanted, and where in them a text stands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from polyturn.rollout.traces.files import FAILED, SET_ASIDE, TraceFiles

DROPPED = (FAILED, SET_ASIDE)
"""States of attempts that no step is trained on."""
_WRITTEN_ALIKE = re.compile(r"[A-Za-z0-9 .,;!?'_-]+")
"""JSON escapes none of it, and it does not reach from a tool's name into the call's arguments."""
DRAWN = ("reasoning", "content")


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def read(cls, text: str) -> Range:
        """`2`, `2:5`, `2:` or `:5`. Raises `ValueError` for anything else."""
        low, colon, high = text.partition(":")
        try:
            first = float(low) if low.strip() else -math.inf
            last = (float(high) if high.strip() else math.inf) if colon else first
        except ValueError as error:
            raise ValueError(f"'{text}' is no range: write 2, 2:5, 2: or :5") from error
        if not first <= last or text.strip() in ("", ":"):
            raise ValueError(f"'{text}' is no range: write 2, 2:5, 2: or :5")
        return cls(low=first, high=last)


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """A place where the text stands."""

    message: int
    """The message's number, from 0; -1 for the sentence of a failed attempt."""
    where: str
    """`content`, `reasoning`, `call` of a tool, or `error`."""
    role: str
    text: str
    """All of that text."""
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """A text that is looked for in what was said, thought and called."""

    text: str
    is_regex: bool = False

    @property
    def written(self) -> str | None:
        """The text as it must stand in the stored JSON of what holds it; None where JSON may write it otherwise."""
        is_plain = not self.is_regex and _WRITTEN_ALIKE.fullmatch(self.text) is not None
        return self.text if is_plain else None

    def compile(self) -> re.Pattern[str]:
        """Case counts where the text has a capital letter. Raises `ValueError` for an expression that is none."""
        written = self.text if self.is_regex else re.escape(self.text)
        # In an expression a capital may stand in a class of characters such as \S.
        letters = re.sub(r"\\.", "", self.text) if self.is_regex else self.text
        try:
            return re.compile(written, 0 if letters != letters.lower() else re.IGNORECASE)
        except re.error as error:
            raise ValueError(f"'{self.text}' is no regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which episodes; what is None is not asked for."""

    parts: tuple[str, ...] | None = None
    steps: Range | None = None
    episode: str | None = None
    """The beginning of its id."""
    group: str | None = None
    task: str | None = None
    environment: str | None = None
    outcome: str | None = None
    """An outcome or a stop reason."""
    reward: Range | None = None
    tool: str | None = None
    """One that was called."""
    tool_errors: bool = False
    dropped: bool = False
    """Only attempts that failed, and what was set aside."""
    pattern: Pattern | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """What `mask` looks at."""
        wanted = {
            "step": self.steps,
            "episode_id": self.episode,
            "group_id": self.group,
            "task_id": self.task,
            "env_id": self.environment,
            "outcome": self.outcome,
            "stop_reason": self.outcome,
            "reward": self.reward,
            "tools": self.tool,
            "num_tool_errors": self.tool_errors or None,
            "state": self.dropped or None,
        }
        return tuple(name for name, value in wanted.items() if value is not None)

    def keep(self, table: pa.Table) -> pa.Table:
        """The rows that are wanted, by all but the text."""
        for name, value in (("group_id", self.group), ("task_id", self.task), ("env_id", self.environment)):
            if value is not None:
                table = table.filter(pc.equal(table[name], value))
        if self.episode is not None:
            table = table.filter(pc.starts_with(table["episode_id"], pattern=self.episode))
        if self.outcome is not None:
            said = pc.or_(
                pc.equal(table["outcome"], self.outcome), pc.equal(table["stop_reason"], self.outcome)
            )
            table = table.filter(said)
        for name, limits in (("step", self.steps), ("reward", self.reward)):
            if limits is not None:
                values = table[name].cast(pa.float64())
                within = pc.and_(pc.greater_equal(values, limits.low), pc.less_equal(values, limits.high))
                table = table.filter(pc.fill_null(within, False))
        if self.tool is not None:
            usage = pc.map_lookup(table["tools"].combine_chunks(), self.tool, "first")
            table = table.filter(pc.is_valid(usage))
        if self.tool_errors:
            table = table.filter(pc.greater(table["num_tool_errors"], 0))
        if self.dropped:
            table = table.filter(pc.is_in(table["state"], pa.array(DROPPED)))
        return table


def select(
    files: TraceFiles, selection: Selection, columns: Iterable[str]
) -> Iterator[tuple[pa.Table, Mapping[str, list[Match]]]]:
    """The wanted episodes file by file: rows with these columns, and where the text stands, by the episode's id.

    Raises:
        ValueError: no part is called so, or the expression is none.
    """
    for part in selection.parts or ():
        if part not in files.parts:
            raise ValueError(
                f"no part '{part}' is stored in {files.directory}; there are {', '.join(files.parts)}"
            )
    pattern = None if selection.pattern is None else selection.pattern.compile()
    names = tuple(dict.fromkeys((*columns, "episode_id", "error", *selection.columns)))
    for place in files.places(selection.parts):
        file, steps = files.files[place], selection.steps
        # Of a journal the steps are those of its name, which is known without reading it.
        if steps is not None and file.step and not steps.low <= file.step <= steps.high:
            continue
        table = selection.keep(files.read_columns(place, names))
        matches: dict[str, list[Match]] = {}
        if pattern is not None and selection.pattern is not None and table.num_rows:
            matches = _search(files, place, table, pattern, selection.pattern.written)
            table = table.filter(pc.is_in(table["episode_id"], pa.array(list(matches), pa.string())))
        if table.num_rows:
            yield table, matches


def selected(files: TraceFiles, selection: Selection, columns: Iterable[str]) -> pa.Table:
    """The same as one table, without the matches."""
    names = list(dict.fromkeys(columns))
    tables = [table.select(names) for table, _ in select(files, selection, names)]
    return pa.concat_tables(tables) if tables else files.empty(names)


def texts_of(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of a message can be read: `reasoning`, `content`, and each `call` as `name(arguments)`."""
    for where in DRAWN:
        if message.get(where):
            yield where, str(message[where])
    for call in message.get("tool_calls") or ():
        yield "call", call_text(call)


def call_text(call: Mapping[str, Any]) -> str:
    """A tool call as `name(arguments)`."""
    function = call.get("function") or {}
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return f"{function.get('name', '')}({written})"


def matches_of(
    messages: Iterable[Mapping[str, Any]], error: str | None, pattern: re.Pattern[str]
) -> list[Match]:
    """Every place where the pattern stands."""
    texts = [
        (number, where, str(message.get("role", "")), text)
        for number, message in enumerate(messages)
        for where, text in texts_of(message)
    ]
    if error:
        texts.append((-1, "error", "", error))
    return [
        Match(message=number, where=where, role=role, text=text, start=found.start(), end=found.end())
        for number, where, role, text in texts
        for found in pattern.finditer(text)
    ]


def _search(
    files: TraceFiles, place: int, table: pa.Table, pattern: re.Pattern[str], written: str | None
) -> dict[str, list[Match]]:
    identities = table["episode_id"].to_pylist()
    messages = files.read_messages(place, identities, written=written)
    found = {
        identity: matches_of(messages.get(identity, ()), error, pattern)
        for identity, error in zip(identities, table["error"].to_pylist(), strict=True)
    }
    return {identity: matches for identity, matches in found.items() if matches}
