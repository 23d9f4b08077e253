"""The files in which a run or an evaluation keeps its episodes, each read as far as it is asked for.

    run/trajectories, run/journal      part `train`: what was trained on, and what is not yet
    run/evaluation/NAME.parquet        part `evaluation/NAME`
    run/set_aside/NAME                 part `set_aside/NAME`: of steps that failed a check
    evaluation/entries/NAME            part NAME, of an evaluation of its own

A columnar file is read column by column, so that 100,000 episodes are listed without reading a message or a token. A
journal has no columns and is read whole; there is one for each step that is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.journal import read_journal
from polyturn.rollout.older_formats import LaterFormat
from polyturn.rollout.store import (
    OPTIONAL_COLUMNS,
    SCHEMA,
    SUMMARY_SCHEMA,
    UNREADABLE,
    check_format,
    read_sound_episodes,
    read_summary,
)

TRAIN = "train"
STEP_NAME = "step_"
WAITING = "waiting"
FAILED = "failed"
SET_ASIDE = "set_aside"
KEPT = "kept"
ABOUT = {"part": pa.string(), "state": pa.string(), "place": pa.int32()}
"""Columns that say where an episode stands: `state` is `kept` (trained on, or evaluated), `waiting` (played, and not
trained on yet, or filtered), `failed`, or `set_aside`; `place` is the number of its file."""
COLUMNS: dict[str, pa.DataType] = {
    **{field.name: field.type for field in SCHEMA},
    **{name: OPTIONAL_COLUMNS[name] for name in ("parent_id", "branch_turn", "failed_part")},
    **ABOUT,
}
"""What can be asked for, but for the columns of tokens, which `read_episodes` gives with the rest of an episode."""
NEEDED = ("episode_id", "outcome")


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceFile:
    """One file of episodes."""

    path: Path
    part: str
    step: int
    """0 where its name tells none."""
    is_journal: bool

    @property
    def is_set_aside(self) -> bool:
        return self.part.startswith(f"{SET_ASIDE}/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One stored episode with what its file says beside it."""

    episode: Episode
    file: TraceFile
    state: str
    advantages: dict[str, float]
    """By the role that wrote it, the empty one without roles; what has none was not trained on."""


class TraceFiles:
    """The stored episodes of one directory."""

    def __init__(self, directory: Path) -> None:
        """Raises `ValueError` where nothing is stored there."""
        self.directory = directory
        self.files: tuple[TraceFile, ...] = tuple(_find(directory))
        self.damage: list[str] = []
        """A sentence for each place that could not be read so far."""
        self._kept_ids: dict[str, set[str]] = {}
        self._journals: dict[Path, tuple[tuple[int, int], tuple[Episode, ...]]] = {}
        if not self.files:
            raise ValueError(_nothing_in(directory))

    @property
    def parts(self) -> list[str]:
        """Their names, in the order of the files."""
        return list(dict.fromkeys(file.part for file in self.files))

    @property
    def usual_parts(self) -> list[str]:
        """What is meant where no part is named: the training of a run, all entries of an evaluation."""
        beside = [part for part in self.parts if not part.startswith((f"{SET_ASIDE}/", "evaluation/"))]
        return beside or self.parts

    def places(self, parts: Iterable[str] | None = None) -> list[int]:
        """The numbers of the files of these parts (None: of the usual ones)."""
        wanted = set(self.usual_parts if parts is None else parts)
        return [place for place, file in enumerate(self.files) if file.part in wanted]

    def read_columns(self, place: int, columns: Iterable[str]) -> pa.Table:
        """One row for each episode of a file, with these of `COLUMNS`.

        What a file of an earlier release does not have is null. An episode of several segments has the advantage of
        the first. What stands in a columnar file, too, is left out of a journal.
        """
        names = list(dict.fromkeys(columns))
        file = self.files[place]
        if file.is_journal:
            table = self._rows(self._journal(file), names)
            if not file.is_set_aside and table.num_rows:
                is_kept = pc.is_in(table["episode_id"], pa.array(self._ids_kept(file.part), pa.string()))
                table = table.filter(pc.invert(is_kept))
        else:
            table = self._columnar(file, names)
        return _with_place(table, file, place).select(names).cast(_schema(names))

    def empty(self, columns: Iterable[str]) -> pa.Table:
        """The table of no episode."""
        return _schema(columns).empty_table()

    def read_messages(
        self, place: int, identities: Sequence[str], *, written: str | None = None
    ) -> dict[str, list[Any]]:
        """The messages of these episodes of a file, by id.

        `written`: only of those in whose stored JSON this stands, whatever its case.
        """
        table = self.read_columns(place, ("episode_id", "messages"))
        table = table.filter(pc.is_in(table["episode_id"], pa.array(identities, pa.string())))
        if written is not None:
            table = table.filter(pc.match_substring(table["messages"], written, ignore_case=True))
        return {
            row["episode_id"]: orjson.loads(row["messages"]) for row in table.to_pylist() if row["messages"]
        }

    def read_episodes(self, place: int, identities: Sequence[str]) -> list[Trace]:
        """These episodes of a file, in this order, as far as they are sound."""
        file = self.files[place]
        if file.is_journal:
            found = {episode.episode_id: episode for episode in self._journal(file)}
            advantages: dict[str, dict[str, float]] = {}
        else:
            found, advantages = self._whole(file, identities)
        return [
            Trace(
                episode=found[identity],
                file=file,
                state=_state(found[identity].outcome, file),
                advantages=advantages.get(identity, {}),
            )
            for identity in identities
            if identity in found
        ]

    def _whole(
        self, file: TraceFile, identities: Sequence[str]
    ) -> tuple[dict[str, Episode], dict[str, dict[str, float]]]:
        wanted = set(identities)
        stored = read_sound_episodes(file.path, only=wanted)
        self._note(stored.damage)
        advantages: dict[str, dict[str, float]] = {}
        try:
            rows = pq.read_table(file.path, columns=["episode_id", "role", "advantage"]).to_pylist()
        except UNREADABLE:
            rows = []
        for row in rows:
            if row["episode_id"] in wanted and row["advantage"] is not None:
                advantages.setdefault(row["episode_id"], {})[row["role"] or ""] = row["advantage"]
        return {one.episode_id: one for one in stored.episodes}, advantages

    def _columnar(self, file: TraceFile, names: Sequence[str]) -> pa.Table:
        stored = [name for name in dict.fromkeys((*names, *NEEDED, "segment")) if name not in ABOUT]
        try:
            short = [name for name in stored if name != "segment"]
            if set(short) <= set(SUMMARY_SCHEMA.names):
                summary = read_summary(file.path, short)
                if summary is not None and summary.num_columns == len(short):
                    return summary
            check_format(file.path)
            opened = pq.ParquetFile(file.path, memory_map=True)
            table = opened.read(columns=[name for name in stored if name in opened.schema_arrow.names])
        except LaterFormat as later:
            self._note((str(later),))
            return self._rows((), names)
        except UNREADABLE:
            # Damage, or an earlier release's: what is sound of it is told apart there.
            try:
                sound = read_sound_episodes(file.path)
            except (OSError, ValueError) as fault:
                self._note((str(fault),))
                return self._rows((), names)
            self._note(sound.damage)
            return self._rows(sound.episodes, names)
        if "segment" in table.column_names:
            first = pc.or_kleene(pc.is_null(table["segment"]), pc.equal(table["segment"], 0))
            table = table.filter(first)
        for name in stored:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, COLUMNS[name]))
        return table

    def _journal(self, file: TraceFile) -> tuple[Episode, ...]:
        """A journal's episodes, read again only where it has grown."""
        try:
            stat = file.path.stat()
            now = (stat.st_size, stat.st_mtime_ns)
            if file.path not in self._journals or self._journals[file.path][0] != now:
                contents = read_journal(file.path)
                self._note(contents.damage)
                self._journals[file.path] = (now, contents.episodes)
        except FileNotFoundError:
            # The step ended while we looked.
            return ()
        except (OSError, LaterFormat) as fault:
            self._note((str(fault),))
            return ()
        return self._journals[file.path][1]

    def _ids_kept(self, part: str) -> list[str]:
        if part not in self._kept_ids:
            found: set[str] = set()
            for file in self.files:
                if file.part == part and not file.is_journal:
                    found |= set(self._columnar(file, ("episode_id",))["episode_id"].to_pylist())
            self._kept_ids[part] = found
        return list(self._kept_ids[part])

    def _rows(self, episodes: Iterable[Episode], names: Sequence[str]) -> pa.Table:
        """Whole episodes as a table of the columns that were asked for."""
        wanted = [name for name in dict.fromkeys((*names, *NEEDED)) if name not in ABOUT]
        return pa.Table.from_pylist([_row(episode, wanted) for episode in episodes], schema=_schema(wanted))

    def _note(self, damage: Iterable[str]) -> None:
        self.damage += [sentence for sentence in damage if sentence not in self.damage]


def _schema(names: Iterable[str]) -> pa.Schema:
    return pa.schema([pa.field(name, COLUMNS[name]) for name in names])


def _row(episode: Episode, names: Iterable[str]) -> dict[str, Any]:
    special: dict[str, Any] = {
        "step": None,
        "outcome": str(episode.outcome),
        "advantage": None,
        "messages": orjson.dumps(episode.messages).decode() if "messages" in names else None,
        "segment": 0 if episode.segments else None,
        "role": episode.segments[0].role if episode.segments else None,
        "num_segments": len(episode.segments),
        "checksum": 0,
        "tools": [(name, _usage(usage)) for name, usage in episode.tools.items()],
        "turn_records": [
            {"role": record.role, "reward": record.reward, "anchor": record.anchor}
            for record in episode.turn_records
        ],
        **{
            name: list(getattr(episode, name).items()) for name in ("reward_parts", "role_rewards", "metrics")
        },
    }
    return {
        name: special[name]
        if name in special
        else getattr(episode.timings if name.endswith("_s") else episode, name)
        for name in names
    }


def _usage(usage: Any) -> dict[str, Any]:
    return {field.name: getattr(usage, field.name) for field in COLUMNS["tools"].item_type}


def _with_place(table: pa.Table, file: TraceFile, place: int) -> pa.Table:
    """The table with the columns of `ABOUT`, and the step that the file's name tells where the rows tell none."""
    number = table.num_rows
    states = [_state(outcome, file) for outcome in table["outcome"].to_pylist()]
    table = table.append_column("part", pa.array([file.part] * number, pa.string()))
    table = table.append_column("state", pa.array(states, pa.string()))
    table = table.append_column("place", pa.array([place] * number, pa.int32()))
    if "step" in table.column_names:
        steps = pc.fill_null(table["step"], file.step)
        table = table.set_column(table.column_names.index("step"), "step", steps)
    return table


def _state(outcome: str, file: TraceFile) -> str:
    if file.is_set_aside:
        return SET_ASIDE
    if outcome == Outcome.FAILED:
        return FAILED
    return WAITING if file.is_journal else KEPT


def _find(directory: Path) -> Iterator[TraceFile]:
    if directory.is_file():
        if directory.suffix in (".parquet", ".journal"):
            yield _file(directory, directory.stem)
        return
    entries = directory / "entries"
    if entries.is_dir():
        for entry in sorted(path for path in entries.iterdir() if path.is_dir()):
            yield from _of_store(entry, entry.name)
    yield from _of_store(directory, TRAIN)
    for path in sorted((directory / "evaluation").glob("*.parquet")):
        yield _file(path, f"evaluation/{path.stem}")
    for folder in sorted((directory / SET_ASIDE).glob("*")):
        for path in sorted([*folder.glob("*.parquet"), *folder.glob("*.journal")]):
            yield _file(path, f"{SET_ASIDE}/{folder.name}")


def _of_store(directory: Path, part: str) -> Iterator[TraceFile]:
    """The files of a `TrajectoryStore`, the columnar ones first."""
    for folder, ending in (("trajectories", ".parquet"), ("journal", ".journal")):
        for path in sorted((directory / folder).glob(f"{STEP_NAME}*{ending}")):
            yield _file(path, part)


def _file(path: Path, part: str) -> TraceFile:
    number = path.stem.rpartition(STEP_NAME)[2]
    return TraceFile(
        path=path,
        part=part,
        step=int(number) if number.isdecimal() else 0,
        is_journal=path.suffix == ".journal",
    )


def _nothing_in(directory: Path) -> str:
    if not directory.exists():
        return f"there is no {directory}; name the directory of a run or of an evaluation"
    if directory.is_file():
        return f"{directory} is no file of episodes (.parquet, .journal); name a run or an evaluation"
    inside = [
        path
        for path in sorted(directory.iterdir())
        if (path / "trajectories").is_dir() or (path / "entries").is_dir()
    ]
    if inside:
        names = ", ".join(str(path) for path in inside[-3:])
        return f"{directory} holds runs and is none itself; name one of them: {names}"
    return (
        f"no episode is stored in {directory}: a run has trajectories/ and journal/ there, an evaluation entries/; "
        "one that has just begun has none until its first episode ends"
    )
