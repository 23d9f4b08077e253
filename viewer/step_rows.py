"""The episodes of one step as columns, read when they are asked for.

`ParquetRows` reads single columns and single row groups of a file of this release. `EpisodeRows` holds episodes in
memory: those of a journal, of an earlier release's file, or of one that is damaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from polyturn.agents.episode import Episode
from polyturn.rollout.journal import read_journal
from polyturn.rollout.older_formats import FORMAT, FORMAT_KEY
from polyturn.rollout.store import SCHEMA, UNREADABLE, read_sound_episodes

MAPS = ("metrics", "reward_parts")
"""Columns of names and numbers."""
ROW_COLUMNS = (
    "episode_id",
    "group_id",
    "env_id",
    "task_id",
    "seed",
    "outcome",
    "stop_reason",
    "error",
    "reward",
    "advantage",
    "num_turns",
    "num_tool_calls",
    "num_tool_errors",
    "num_drawn_tokens",
    "num_segments",
    "generate_s",
    "tools_s",
    "queue_s",
    "total_s",
    "parent_id",
    "branch_turn",
    *MAPS,
)
"""What a row of the table is made of."""
TYPES = {
    **{field.name: field.type for field in SCHEMA},
    "parent_id": pa.string(),
    "branch_turn": pa.int32(),
}


class StepRows(Protocol):
    """The n episodes of a step, in the order in which they were written."""

    @property
    def problems(self) -> list[str]:
        """Sentences on what is damaged."""
        ...

    def __len__(self) -> int: ...

    def load(self, names: Iterable[str]) -> None:
        """Read these columns together, if they are not there."""
        ...

    def column(self, name: str) -> pa.Array:
        """A column of `ROW_COLUMNS`, or `messages` as JSON, [n]."""
        ...

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """`ROW_COLUMNS` of these episodes."""
        ...

    def has_version(self, version: int) -> npt.NDArray[np.bool_]:
        """Whether a token of a policy version is in each episode, [n]."""
        ...

    def episode(self, place: int) -> Episode | None:
        """One episode whole; None where its row is damaged."""
        ...


class EpisodeRows:
    """Episodes that are in memory."""

    def __init__(self, episodes: Sequence[Episode], problems: Sequence[str] = ()) -> None:
        self._episodes = list(episodes)
        self._columns: dict[str, pa.Array] = {}
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self._episodes)

    def load(self, names: Iterable[str]) -> None:
        """All is there."""

    def column(self, name: str) -> pa.Array:
        if name not in self._columns:
            values = [_value(episode, name) for episode in self._episodes]
            self._columns[name] = pa.array(values, TYPES[name])
        return self._columns[name]

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {name: _value(self._episodes[place], name) for name in ROW_COLUMNS} for place in places
        ]

    def has_version(self, version: int) -> npt.NDArray[np.bool_]:
        return np.array(
            [
                any((segment.policy_versions == version).any() for segment in episode.segments)
                for episode in self._episodes
            ],
            dtype=np.bool_,
        )

    def episode(self, place: int) -> Episode | None:
        return self._episodes[place]


def _value(episode: Episode, name: str) -> Any:
    match name:
        case "outcome":
            return str(episode.outcome)
        case "num_segments":
            return len(episode.segments)
        case "advantage":
            return None
        case "generate_s" | "tools_s" | "queue_s" | "total_s":
            return getattr(episode.timings, name)
        case "metrics" | "reward_parts":
            return list(getattr(episode, name).items())
        case "messages":
            return orjson.dumps(episode.messages).decode()
        case "parent_id":
            return episode.parent_id or None
        case "branch_turn":
            return episode.branch_turn if episode.parent_id else None
        case _:
            return getattr(episode, name)


class DamagedFile(Exception):
    """A file turned out to be damaged while columns of it were read: its sound rows are what is left."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is damaged")
        self.path = path


class ParquetRows:
    """A file whose columns are read one by one. It is open while it is read, and not between.

    Methods raise `DamagedFile`.
    """

    def __init__(self, path: Path) -> None:
        """Raises one of `UNREADABLE` for a file that is not of this release, or is damaged."""
        self._path = path
        self.problems: list[str] = []
        with _opened(path) as file:
            schema = file.schema_arrow
            if (schema.metadata or {}).get(FORMAT_KEY) != str(FORMAT).encode():
                raise ValueError(f"{path} is of another format")
            for name in (*ROW_COLUMNS, "messages", "segment", "policy_versions"):
                if name in schema.names and schema.field(name).type != TYPES[name]:
                    raise ValueError(f"{path}: the column {name!r} is not that of a trajectory file")
            self._names = set(schema.names)
            metadata = file.metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            segment = _whole(file.read(columns=["segment"], use_threads=False).column("segment"))
        self._group_starts = np.cumsum([0, *counts])
        first = pc.fill_null(pc.equal(segment, 0), True).to_numpy(zero_copy_only=False)
        self._first = np.flatnonzero(first)
        """The row of each episode that has what belongs to it as a whole."""
        self._columns: dict[str, pa.Array] = {}

    def __len__(self) -> int:
        return len(self._first)

    def load(self, names: Iterable[str]) -> None:
        wanted = [name for name in dict.fromkeys(names) if name not in self._columns]
        there = [name for name in wanted if name in self._names]
        if there:
            table = self._read(there)
            first = pa.array(self._first)
            self._columns |= {name: _whole(table.column(name)).take(first) for name in there}
        self._columns |= {name: pa.nulls(len(self), TYPES[name]) for name in set(wanted) - set(there)}

    def column(self, name: str) -> pa.Array:
        if name == "messages":  # too large to be kept
            return _whole(self._read([name]).column(name)).take(pa.array(self._first))
        self.load([name])
        return self._columns[name]

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        rows = self._first[np.asarray(places, dtype=np.int64)]
        groups = np.searchsorted(self._group_starts, rows, side="right") - 1
        wanted = np.unique(groups)
        names = [name for name in ROW_COLUMNS if name in self._names]
        table = self._read(names, groups=wanted.tolist())
        sizes = np.diff(self._group_starts)[wanted]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]) if len(wanted) else np.zeros(0, dtype=np.int64)
        within = rows - self._group_starts[groups] + starts[np.searchsorted(wanted, groups)]
        missing = dict.fromkeys(name for name in ROW_COLUMNS if name not in self._names)
        with _damage_of(self._path):
            return [{**missing, **row} for row in table.take(pa.array(within)).to_pylist()]

    def has_version(self, version: int) -> npt.NDArray[np.bool_]:
        versions = _whole(self._read(["policy_versions"]).column("policy_versions"))
        owners = np.searchsorted(self._first, np.arange(len(versions)), side="right") - 1
        lengths = pc.fill_null(pc.list_value_length(versions), 0).to_numpy(zero_copy_only=False)
        flat = versions.flatten().to_numpy(zero_copy_only=False)
        found = np.zeros(len(self), dtype=np.bool_)
        found[np.repeat(owners, lengths)[flat == version]] = True
        return found

    def episode(self, place: int) -> Episode | None:
        start = int(self._first[place])
        end = int(self._first[place + 1]) if place + 1 < len(self) else int(self._group_starts[-1])
        first, last = np.searchsorted(self._group_starts, [start, end - 1], side="right") - 1
        with _damage_of(self._path):
            found = read_sound_episodes(self._path, row_groups=range(int(first), int(last) + 1))
        wanted = self.column("episode_id")[place].as_py()
        return next((episode for episode in found.episodes if episode.episode_id == wanted), None)

    def _read(self, names: Sequence[str], *, groups: Sequence[int] | None = None) -> pa.Table:
        with _damage_of(self._path), _opened(self._path) as file:
            every = range(file.num_row_groups) if groups is None else groups
            return file.read_row_groups(list(every), columns=list(names), use_threads=False)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    with path.open("rb") as opened:
        yield pq.ParquetFile(opened, page_checksum_verification=True)


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as fault:
        raise DamagedFile(path) from fault


def _whole(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def rows_of_file(path: Path) -> StepRows:
    """The episodes of a columnar file, whatever is left of it; none, and why, where nothing is."""
    try:
        return ParquetRows(path)
    except UNREADABLE:
        return sound_rows_of_file(path)


def sound_rows_of_file(path: Path) -> EpisodeRows:
    """The same, of which every row was checked."""
    try:
        found = read_sound_episodes(path)
    except UNREADABLE as fault:
        return EpisodeRows([], [_sentence(path, fault)])
    return EpisodeRows(found.episodes, found.damage)


def rows_of_journal(path: Path) -> EpisodeRows:
    """The episodes of a journal: those that are whole, also while it is being written."""
    try:
        found = read_journal(path)
    except UNREADABLE as fault:
        return EpisodeRows([], [_sentence(path, fault)])
    return EpisodeRows(found.episodes, found.damage)


def _sentence(path: Path, fault: BaseException) -> str:
    text = str(fault) or type(fault).__name__
    return text if str(path) in text else f"{path}: {text}"
