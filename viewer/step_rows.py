"""The episodes of one step as columns, read when they are asked for.

`ParquetRows` reads a file of this release as far as it is asked for. `EpisodeRows` holds episodes in
memory: those of a journal, of an earlier release's file, or of one that is damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from polyturn.rollout.older_formats import FORMAT
from polyturn.rollout.row_checksums import rows_of
from polyturn.rollout.store import (
    SCHEMA,
    UNREADABLE,
    check_format,
    read_sound_episodes,
    read_summary,
)

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


Behavior = tuple[str, int, npt.NDArray[np.bool_], npt.NDArray[np.float32]]
"""Of a segment of T tokens: its episode's id, its number, which tokens were sampled [T], their logprobs [T]."""


class StepRows(Protocol):
    """The n episodes of a step, in the order in which they were written."""

    @property
    def problems(self) -> list[str]:
        """Sentences on what is damaged."""
        ...

    def __len__(self) -> int: ...

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

    def advantages(self, place: int) -> dict[str, float]:
        """Of one episode, by the role that wrote it, the empty one without roles."""
        ...

    def behavior(self) -> Iterator[Behavior]:
        """Of every segment."""
        ...


class EpisodeRows:
    """Episodes that are in memory."""

    def __init__(self, episodes: Sequence[Episode], problems: Sequence[str] = ()) -> None:
        self._episodes = list(episodes)
        self._columns: dict[str, pa.Array] = {}
        self.problems = list(problems)

    def __len__(self) -> int:
        return len(self._episodes)

    def column(self, name: str) -> pa.Array:
        if name not in self._columns:
            values = [_value(episode, name) for episode in self._episodes]
            self._columns[name] = pa.array(values, TYPES[name])
        return self._columns[name]

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        return [{name: _value(self._episodes[place], name) for name in ROW_COLUMNS} for place in places]

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

    def advantages(self, place: int) -> dict[str, float]:
        del place
        return {}

    def behavior(self) -> Iterator[Behavior]:
        for episode in self._episodes:
            for number, segment in enumerate(episode.segments):
                yield episode.episode_id, number, segment.sampled, segment.logprobs


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
    """A columnar file: short columns are in memory, long ones are read when they are asked for.

    Methods raise `DamagedFile`.
    """

    def __init__(self, path: Path) -> None:
        """Raises one of `UNREADABLE` for a file that is not of this release, or is damaged."""
        self._path = path
        self.problems: list[str] = []
        if check_format(path) != FORMAT:
            raise ValueError(f"{path} is of an earlier format")
        table = read_summary(path)
        if table is None:
            table = self._first_rows([name for name in ROW_COLUMNS if name in TYPES])
        for name in ROW_COLUMNS:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), TYPES[name]))
        self._table = table.select(list(ROW_COLUMNS)).combine_chunks()

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> pa.Array:
        if name == "messages":
            return self._by_episode(self._first_rows(["episode_id", "messages"]), "messages")
        return _whole(self._table.column(name))

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        with _damage_of(self._path):
            return self._table.take(pa.array(places, pa.int64())).to_pylist()

    def has_version(self, version: int) -> npt.NDArray[np.bool_]:
        table = self._read(["episode_id", "policy_versions"])
        versions = _whole(table.column("policy_versions"))
        lengths = pc.fill_null(pc.list_value_length(versions), 0).to_numpy(zero_copy_only=False)
        flat = versions.flatten().to_numpy(zero_copy_only=False)
        rows = np.zeros(len(versions), dtype=np.bool_)
        rows[np.repeat(np.arange(len(versions)), lengths)[flat == version]] = True
        has_it = set(table.column("episode_id").filter(pa.array(rows)).to_pylist())
        identities = self.column("episode_id").to_pylist()
        return np.array([identity in has_it for identity in identities], dtype=np.bool_)

    def episode(self, place: int) -> Episode | None:
        wanted = self.column("episode_id")[place].as_py()
        with _damage_of(self._path):
            found = read_sound_episodes(self._path, only=[wanted])
        return next(iter(found.episodes), None)

    def advantages(self, place: int) -> dict[str, float]:
        wanted = self.column("episode_id")[place]
        rows = self._read(["episode_id", "role", "advantage"])
        rows = rows.filter(pc.equal(rows.column("episode_id"), wanted)).to_pylist()
        return {row["role"] or "": row["advantage"] for row in rows if row["advantage"] is not None}

    def behavior(self) -> Iterator[Behavior]:
        arrays = ("sampled", "logprobs")
        with _damage_of(self._path):
            rows = rows_of(self._read(["episode_id", "segment", *arrays]), arrays)
        for row in rows:
            if row["segment"] is not None:
                yield row["episode_id"], row["segment"], row["sampled"], row["logprobs"]

    def _first_rows(self, names: Sequence[str]) -> pa.Table:
        """The row of each episode that has what belongs to it as a whole."""
        table = self._read([*names, "segment"])
        return table.filter(pc.fill_null(pc.equal(table.column("segment"), 0), True))

    def _by_episode(self, table: pa.Table, name: str) -> pa.Array:
        """A column of a table in the order of the episodes here."""
        place_of = {identity: place for place, identity in enumerate(table.column("episode_id").to_pylist())}
        places = [place_of.get(identity) for identity in self.column("episode_id").to_pylist()]
        return _whole(table.column(name)).take(pa.array(places, pa.int64()))

    def _read(self, names: Sequence[str]) -> pa.Table:
        with _damage_of(self._path), _opened(self._path) as file:
            there = [name for name in names if name in file.schema_arrow.names]
            return file.read(columns=there, use_threads=False)


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
