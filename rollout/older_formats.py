"""Trajectory files and journals of earlier releases, read as what this one writes; and what is said of a later one's.

format 1   no checksums. Columns for metrics, tools, roles and the records of turns came one by one, without another
           number. The journal has a line of JSON for each episode.
format 2   checksums, digests of tasks, what group rewards added. A line of the journal stands behind its checksum.
format 3   columns of numbers as they are in memory; the journal is this release's.
format 4   this release's (`store.py`): how many tokens were drawn, and branches of an episode.

What a format had no place for is as if nothing had been recorded: no metrics, no tools, no records of turns, one role.
A format gets another number when its columns are not those of the one before. A later format of the trajectory file
says its number in the metadata, as these do; a later journal has another mark in a head of the same form.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import TOKEN_COLUMNS, Segment
from polyturn.rollout.row_checksums import rows_of, sound_rows
from polyturn.tools.types import ToolUsage

FORMAT = 4
"""Of trajectory files."""
JOURNAL_FORMAT = 3
FORMAT_KEY = b"polyturn_trajectories"
"""In a trajectory file's metadata."""
ROUTING = "routed_experts"
NOT_RECORDED: Mapping[str, Any] = {
    "num_drawn_tokens": 0,
    "task_digest": "",
    "group_reward": None,
    "role_rewards": (),
    "metrics": (),
    "turn_records": (),
    "tools": (),
    "role": "",
}
"""What a row of a file has that lacks the column."""


class LaterFormat(ValueError):
    """A file was written by a later release."""

    def __init__(self, path: Path, number: int, *, newest: int) -> None:
        super().__init__(
            f"{path} is of format {number}, which a later release of Polyturn writes; this one reads up to {newest}: "
            "go on with the release that wrote it"
        )


def format_of(path: Path, schema: pa.Schema) -> int:
    """The number of a trajectory file's format, whose columns are not those of this release.

    Raises:
        LaterFormat: a later release wrote it.
        ValueError: it is no trajectory file.
    """
    said = (schema.metadata or {}).get(FORMAT_KEY, b"").decode(errors="replace")
    number = int(said) if said.isdecimal() else 0
    if number > FORMAT:
        raise LaterFormat(path, number, newest=FORMAT)
    if number not in range(1, FORMAT) or not {"episode_id", "segment", *TOKEN_COLUMNS} <= set(schema.names):
        raise ValueError(f"{path} does not have the columns of a trajectory file of any release")
    if ROUTING in schema.names and schema.field(ROUTING).type == pa.list_(pa.string()):
        raise ValueError(f"{path} records the experts of each token in a form that is not read any more")
    return number


def older_rows(table: pa.Table, number: int, array_columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table of an older format as those of this release: the sound ones, but of format 1 all.

    `array_columns` are those whose values are read as arrays; before format 3 those of the tokens were.
    """
    arrays = array_columns if number > 2 else tuple(TOKEN_COLUMNS)
    rows = rows_of(table, arrays) if number == 1 else sound_rows(table, arrays)
    num_segments = Counter(row["episode_id"] for row in rows if row["segment"] is not None)
    return [
        {
            **NOT_RECORDED,
            "num_segments": num_segments[row["episode_id"]],
            **row,
            ROUTING: row.get(ROUTING) if number > 2 else _routing(row.get(ROUTING)),
        }
        for row in rows
    ]


def older_lines(path: Path) -> Iterator[tuple[int, Episode | str]]:
    """The episodes of a journal of lines, by their numbers from 1, or what is wrong with a line.

    What the writer died in, a last line without an end, is left out.
    """
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else (b"",)
    for number, line in enumerate(lines, start=1):
        try:
            yield number, _episode(_body(line))
        except (ValueError, KeyError, TypeError, AssertionError) as fault:
            yield number, str(fault)


_HEAD = re.compile(rb"(([0-9a-f]{8}) ([0-9a-f]+) )([0-9a-f]{8}) ")
"""Before a line of format 2: the CRC-32 of the line, its length, and the CRC-32 of the two."""


def _body(line: bytes) -> bytes:
    """A line's JSON. Raises `ValueError` where it is not what was written."""
    if line.startswith(b"{"):
        return line
    head = _HEAD.match(line)
    body = line[head.end() :] if head is not None else b""
    if head is None or zlib.crc32(head[1]) != int(head[4], 16) or zlib.crc32(body) != int(head[2], 16):
        raise ValueError("its checksum does not fit")
    return body


def _episode(body: bytes) -> Episode:
    values: dict[str, Any] = orjson.loads(body)
    values["outcome"] = Outcome(values["outcome"])
    values["messages"] = tuple(values["messages"])
    values["segments"] = tuple(
        Segment(**{**segment, ROUTING: _routing(segment.get(ROUTING))}) for segment in values["segments"]
    )
    values["turn_records"] = tuple(TurnRecord(**record) for record in values.get("turn_records", ()))
    values["timings"] = EpisodeTimings(**values["timings"])
    values["tools"] = {name: ToolUsage(**usage) for name, usage in values.get("tools", {}).items()}
    return Episode(**values)


def _routing(rows: Any) -> Any:
    """The experts of each token [tokens, layers x experts per token]. Raises `ValueError` for those of format 1."""
    return np.array(rows, dtype=np.int16) if rows else None
