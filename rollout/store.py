"""The trajectories of a run: journals of what no step has been trained on, and one columnar file per finished step.

The module is long because what a row holds is said in it three times, side by side: as columns, as a row of an episode
is made, and as an episode is made of rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import TOKEN_COLUMNS, Segment
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.rollout.journal import Journal, JournalContents, read_journal, stream_journal
from polyturn.rollout.older_formats import (
    FORMAT,
    FORMAT_KEY,
    LaterFormat,
    format_of,
    older_lines,
    older_rows,
)
from polyturn.rollout.row_checksums import row_checksums, sound_rows
from polyturn.rollout.summaries import SUMMARY, packed, summary_schema, unpacked
from polyturn.rollout.whole_file import whole_file
from polyturn.tools.types import ToolUsage

TOOL_USAGE = pa.struct(
    [
        pa.field(field.name, pa.int64() if field.name.startswith("num_") else pa.float64(), nullable=False)
        for field in fields(ToolUsage)
    ]
)
TURN_RECORD = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),
        pa.field("anchor", pa.string(), nullable=False),
    ]
)

# One row per segment. An episode without tokens has one row whose `segment` and token columns are null; what belongs
# to the episode as a whole is in each of its rows, but the messages only in its first.
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("episode_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("env_id", pa.string(), nullable=False),
        pa.field("task_id", pa.string(), nullable=False),
        pa.field("task_digest", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("group_reward", pa.float64()),
        pa.field("reward_parts", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("role_rewards", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("metrics", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("advantage", pa.float64()),
        pa.field("num_turns", pa.int32(), nullable=False),
        pa.field("turn_records", pa.list_(TURN_RECORD), nullable=False),
        pa.field("num_tool_calls", pa.int32(), nullable=False),
        pa.field("num_tool_errors", pa.int32(), nullable=False),
        pa.field("num_drawn_tokens", pa.int64(), nullable=False),
        pa.field("tools", pa.map_(pa.string(), TOOL_USAGE), nullable=False),
        pa.field("generate_s", pa.float64(), nullable=False),
        pa.field("tools_s", pa.float64(), nullable=False),
        pa.field("queue_s", pa.float64(), nullable=False),
        pa.field("total_s", pa.float64(), nullable=False),
        pa.field("messages", pa.string()),
        pa.field("num_segments", pa.int32(), nullable=False),
        pa.field("segment", pa.int32()),
        pa.field("role", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("sampled", pa.list_(pa.bool_())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("policy_versions", pa.list_(pa.int32())),
        pa.field("turns", pa.list_(pa.int16())),
        pa.field("checksum", pa.uint32(), nullable=False),
    ],
    metadata={FORMAT_KEY: str(FORMAT).encode()},
)
RECORD_COLUMNS = {
    "routed_experts": pa.list_(pa.int16()),
    "support_sizes": pa.list_(pa.int32()),
    "support_token_ids": pa.list_(pa.int32()),
    "teacher_logprobs": pa.list_(pa.float32()),
}
"""Of files whose engine recorded the experts of each token (the numbers of all tokens of a segment, in C order), or
what each was drawn from, or with what a teacher said of each."""
BRANCH_COLUMNS = {"parent_id": pa.string(), "branch_turn": pa.int32()}
"""Of files in which an episode is a branch of another, or was to be one; null for the others."""
FAILURE_COLUMNS = {"failed_part": pa.string()}
"""Of files with attempts that a known part of their environment failed; null for the others."""
CALL_COLUMNS = {"num_recovered_calls": pa.int32()}
"""Of files with an episode in which a malformed call was made for what it plainly means."""
ANSWER_COLUMNS = {"answer": pa.string()}
"""Of files with an episode in which an answer was given; null for the others."""
SPAN = pa.struct(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("started", pa.float32(), nullable=False),
        pa.field("ended", pa.float32(), nullable=False),
    ]
)
SPAN_COLUMNS = {"spans": pa.list_(SPAN)}
"""Of files with an episode of which it is known when it waited for what (`EpisodeTimings.spans`); in its first row."""
OPTIONAL_COLUMNS = {
    **RECORD_COLUMNS,
    **BRANCH_COLUMNS,
    **FAILURE_COLUMNS,
    **CALL_COLUMNS,
    **ANSWER_COLUMNS,
    **SPAN_COLUMNS,
}
"""In the order in which they stand behind the others."""
ARRAY_COLUMNS = (*TOKEN_COLUMNS, *RECORD_COLUMNS)
ENCODINGS = {
    f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("token_ids", "logprobs", "teacher_logprobs")
}
"""Of columns whose values hardly repeat: bytes of equal weight stand together, which zstd makes more of."""
ROWS_PER_GROUP = 8
"""Parquet compresses and checks so many rows together: damage costs no more than these."""
NUM_ROWS = b"polyturn_num_rows"
"""In the file's metadata: the rows that were written."""
SUMMARY_SCHEMA = summary_schema(SCHEMA, {**BRANCH_COLUMNS, **FAILURE_COLUMNS})
UNREADABLE = (OSError, ValueError, KeyError, OverflowError, MemoryError, pa.ArrowException)
"""What pyarrow raises, or the making of an episode, where bytes are not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEpisodes:
    """What a file holds."""

    episodes: tuple[Episode, ...]
    damage: tuple[str, ...]
    """A sentence for each place that was changed since it was written; its episodes are not among the others."""


class TrajectoryStore:
    """Trajectories under `directory`: `trajectories/step_000001.parquet`, `journal/step_000002.journal`.

    An episode is safe from the moment `journal` returns. `write_step` makes the columnar file of a step; journals are
    what a run is resumed from, and are kept until `forget` says that they are not needed any more. A journal holds the
    prompts that are drawn for one step; where steps overlap, another may be trained on them. Attempts that failed stand
    in `failed/step_000001.journal`, too, and stay there for people to look at; nothing is resumed from them.
    """

    def __init__(self, directory: Path) -> None:
        self._trajectories = directory / "trajectories"
        self._journals = directory / "journal"
        self._failures = directory / "failed"
        self._aside = directory / "set_aside"
        self._open: dict[Path, Journal] = {}
        self._opening = threading.Lock()
        # One: several would keep the event loop from the interpreter.
        self._writer = ThreadPoolExecutor(1, "trajectories")

    def path(self, step: int) -> Path:
        """The columnar file of a step."""
        return self._trajectories / f"step_{step:06d}.parquet"

    def steps(self) -> list[int]:
        """The steps that have a columnar file, in order."""
        return sorted(_numbered(self._trajectories, ".parquet"))

    def begun_after(self, step: int) -> list[int]:
        """The later steps of which anything is kept, in order."""
        kept = {number for number, _ in self._journal_files()} | set(self.steps())
        return sorted(number for number in kept if number > step)

    async def keep(self, step: int, episode: Episode) -> None:
        """As `journal`, in the store's writing thread: neither making the record nor a slow disk holds up the loop.

        Who is cancelled while it waits leaves the episode to be written all the same.
        """
        loop = asyncio.get_running_loop()
        await asyncio.shield(loop.run_in_executor(self._writer, self.journal, step, episode))

    def journal(self, step: int, episode: Episode) -> None:
        """Keep one attempt of a prompt of this step, failed or not. Several threads may do so at once."""
        self._journal_at(self.journal_path(step)).append(episode)
        if episode.outcome is Outcome.FAILED:
            # Whoever looks at it misses it where the disk is full; the run does not.
            with contextlib.suppress(OSError):
                self._journal_at(self.failures_path(step)).append(episode)

    def _journal_at(self, path: Path) -> Journal:
        with self._opening:
            if path not in self._open:
                self._open[path] = Journal(path)
            return self._open[path]

    def journaled(self, step: int) -> list[Episode]:
        """The attempts of a step that was begun before, all that are as they were written."""
        return list(self.stored(step).episodes)

    def stored(self, step: int) -> StoredEpisodes:
        """The same, and what is damaged.

        They are the journal's; what that lacks is taken from the step's columnar file, if it got so far.
        """
        contents, older = read_journal(self.journal_path(step)), _read_older(self._older_journal_path(step))
        found = {episode.episode_id: episode for episode in (*older.episodes, *contents.episodes)}
        damage = older.damage + contents.damage
        if (damage or not found) and self.path(step).exists():
            stored = _read_whatever_is_sound(self.path(step))
            found = {episode.episode_id: episode for episode in stored.episodes} | found
            damage += stored.damage
        return StoredEpisodes(episodes=tuple(found.values()), damage=damage)

    def stream(self, step: int, on_damage: Callable[[str], None]) -> Iterator[Episode]:
        """The episodes of a step, one after the other: of its columnar file, or else of the journal, where they may be
        attempts that failed and were played again. Raises as `read_sound_episodes`.
        """
        if self.path(step).exists():
            yield from stream_sound_episodes(self.path(step), on_damage)
            return
        yield from _read_older(self._older_journal_path(step)).episodes
        for found in stream_journal(self.journal_path(step)):
            if isinstance(found, Episode):
                yield found
            elif found is not None:
                on_damage(found)

    def write_step(
        self, step: int, episodes: Sequence[Episode], *, advantages: Mapping[str, float] | None = None
    ) -> Path:
        """Write the step's columnar file, all of it or nothing.

        `advantages` are by `Episode.part_id`, of the whole or of one role; what has none has null.
        """
        path = self.path(step)
        write_episodes(path, episodes, step=step, advantages=advantages)
        return path

    def forget(self, step: int) -> None:
        """Remove the journals of all steps up to this one: it is trained, and nothing will be played of it again."""
        for number, path in self._journal_files():
            if number <= step:
                self._close_journal(number)
                path.unlink()

    def set_aside(self, step: int, *, journals: Iterable[int] = ()) -> Path | None:
        """Move what is kept of a step out of the way, so that it is played anew; where to, if there is anything.

        `journals` are the numbers of those that its episodes stand in; without any, that of the step.
        """
        numbers = sorted(set(journals)) or [step]
        for number in numbers:
            self._close_journal(number)
        of_journals = [path for number, path in self._journal_files() if number in numbers]
        kept = [path for path in (*of_journals, self.path(step)) if path.exists()]
        if not kept:
            return None
        name = f"step_{step:06d}"
        number = 1 + sum(path.name.startswith(name) for path in self._aside.glob("*"))
        target = self._aside / f"{name}-{number}"
        target.mkdir(parents=True)
        for path in kept:
            path.rename(target / path.name)
        return target

    def read_step(self, step: int) -> list[Episode]:
        """The episodes of a finished step, in the order in which they were written."""
        return read_episodes(self.path(step))

    def close(self) -> None:
        """Close the journal, with what is still being written."""
        self._writer.shutdown()
        for path in list(self._open):
            self._close(path)

    @property
    def draws_path(self) -> Path:
        """What a curriculum that draws by results has drawn."""
        return self._trajectories.with_name("draws.jsonl")

    def journal_path(self, step: int) -> Path:
        """The journal of a step."""
        return self._journals / f"step_{step:06d}.journal"

    def failures_path(self, step: int) -> Path:
        """The attempts of a step that failed."""
        return self._failures / f"step_{step:06d}.journal"

    def _older_journal_path(self, step: int) -> Path:
        """The journal of a step, as earlier releases wrote it."""
        return self._journals / f"step_{step:06d}.jsonl"

    def _journal_files(self) -> list[tuple[int, Path]]:
        """All journals with their numbers, of whatever release."""
        return [
            *_numbered(self._journals, ".journal").items(),
            *_numbered(self._journals, ".jsonl").items(),
        ]

    def _close_journal(self, step: int) -> None:
        self._close(self.journal_path(step))
        self._close(self.failures_path(step))

    def _close(self, path: Path) -> None:
        with self._opening:
            journal = self._open.pop(path, None)
        if journal is not None:
            journal.close()


def _numbered(folder: Path, ending: str) -> dict[int, Path]:
    """The files of steps in a folder, by their numbers; what is called otherwise is not ours."""
    found = folder.glob(f"step_*{ending}")
    return {int(number): path for path in found if (number := path.stem.removeprefix("step_")).isdigit()}


def schema_with(names: Iterable[str]) -> pa.Schema:
    """The schema of a file that has these of `OPTIONAL_COLUMNS`."""
    schema = SCHEMA
    for name in names:
        schema = schema.append(pa.field(name, OPTIONAL_COLUMNS[name]))
    return schema


def write_episodes(
    path: Path, episodes: Sequence[Episode], *, step: int, advantages: Mapping[str, float] | None = None
) -> None:
    """Write a columnar file of episodes that is either complete or not there."""
    rows = [(episode, place) for episode in episodes for place in range(max(1, len(episode.segments)))]
    segments = [segment for episode in episodes for segment in episode.segments]
    recorded = [
        name for name in RECORD_COLUMNS if any(_array_of(segment, name) is not None for segment in segments)
    ]
    branches = BRANCH_COLUMNS if any(episode.parent_id for episode in episodes) else ()
    failures = FAILURE_COLUMNS if any(episode.failed_part for episode in episodes) else ()
    calls = CALL_COLUMNS if any(episode.num_recovered_calls for episode in episodes) else ()
    answers = ANSWER_COLUMNS if any(episode.answer is not None for episode in episodes) else ()
    spans = SPAN_COLUMNS if any(episode.timings.spans for episode in episodes) else ()
    schema = schema_with([*recorded, *branches, *failures, *calls, *answers, *spans])
    schema = schema.with_metadata({**schema.metadata, NUM_ROWS: str(len(rows)).encode()})
    encodings = {name: how for name, how in ENCODINGS.items() if name.partition(".")[0] in schema.names}
    split = [name.partition(".")[0] for name in encodings]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        whole_file(path) as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=[name for name in schema.names if name not in split],
            column_encoding=encodings,
            write_page_checksum=True,
            # Nothing checks them, and a reader that filters by them would pass rows over.
            write_statistics=False,
        ) as writer,
    ):
        for start in range(0, len(rows), ROWS_PER_GROUP):
            group = rows[start : start + ROWS_PER_GROUP]
            writer.write_table(_table(group, schema, step=step, advantages=advantages or {}))
        summary = [_plain_row(episode, 0, step, advantages or {}) for episode in episodes]
        # Values of a footer are text for pyarrow's reader.
        content = packed(pa.Table.from_pylist(summary, schema=SUMMARY_SCHEMA))
        writer.add_key_value_metadata({SUMMARY: content})


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a columnar file.

    Raises:
        ValueError: it is not one of ours, or it is damaged: `read_sound_episodes` reads what is left of it.
    """
    found = read_sound_episodes(path)
    if found.damage:
        raise ValueError(f"{found.damage[0]}; read_sound_episodes reads the others")
    return list(found.episodes)


def read_sound_episodes(path: Path, *, only: Collection[str] | None = None) -> StoredEpisodes:
    """The episodes of a columnar file whose bytes are those that were written, and what is damaged.

    Earlier releases' files are read, too; in the oldest ones, which have no checksums, not all damage is found.
    Of a file of which `only` some episodes are wanted, by id, no more is read than holds them.

    Raises:
        FileNotFoundError: it is not there.
        LaterFormat: a later release wrote it.
        ValueError: it has the columns of no release.
    """
    damage: list[str] = []
    episodes = tuple(stream_sound_episodes(path, damage.append, only=only))
    return StoredEpisodes(episodes=episodes, damage=tuple(damage))


def stream_sound_episodes(
    path: Path, on_damage: Callable[[str], None], *, only: Collection[str] | None = None
) -> Iterator[Episode]:
    """The same episodes one after the other, with a few rows of the file in memory; `on_damage` hears what is damaged.

    Raises as `read_sound_episodes`, when the first is asked for.
    """
    return _whole_episodes(_stream_rows(path, on_damage, only))


def _stream_rows(
    path: Path, on_damage: Callable[[str], None], only: Collection[str] | None
) -> Iterator[Mapping[str, Any]]:
    with path.open("rb") as opened:
        try:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            schema, num_groups = file.schema_arrow, file.num_row_groups
            expected = int((schema.metadata or {}).get(NUM_ROWS, b"-1"))
        except UNREADABLE as fault:
            on_damage(f"{path} is damaged and cannot be read: {_said(fault)}")
            return
        number = _format_of(path, schema)
        num_rows, is_damaged = 0, False
        for group in range(num_groups):
            try:
                if only is not None and not _holds(file, group, only):
                    continue
                table = file.read_row_group(group)
                rows = (
                    sound_rows(table, ARRAY_COLUMNS)
                    if number == FORMAT
                    else older_rows(table, number, ARRAY_COLUMNS)
                )
            except UNREADABLE as fault:
                is_damaged = True
                on_damage(f"{path}: row group {group} is damaged: {_said(fault)}")
                continue
            num_rows += len(rows)
            yield from (row for row in rows if only is None or row["episode_id"] in only)
    if only is None and number > 1 and num_rows != expected and not is_damaged:
        on_damage(f"{path} is damaged: {num_rows} of its rows have the checksum that they were written with")


def _holds(file: pq.ParquetFile, group: int, only: Collection[str]) -> bool:
    """Whether a row group has a row of one of these episodes."""
    found = file.read_row_group(group, columns=["episode_id"])["episode_id"].to_pylist()
    return any(identity in only for identity in found)


def read_summary(path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    """A row for each episode of a file of this release, with these columns of `SUMMARY_SCHEMA` (None: with all), as far
    as it has them; None for a file without a summary.

    Raises `OSError` or another of `UNREADABLE` where the file cannot be read.
    """
    return unpacked(pq.read_metadata(path).metadata, columns)


def check_format(path: Path) -> int:
    """The number of a file's format, where its columns are read here.

    Raises as `read_sound_episodes`, and `ValueError` for damage.
    """
    with path.open("rb") as opened:
        try:
            schema = pq.ParquetFile(opened).schema_arrow
        except UNREADABLE as fault:
            raise ValueError(f"{path} is damaged and cannot be read: {_said(fault)}") from fault
    return _format_of(path, schema)


def _format_of(path: Path, schema: pa.Schema) -> int:
    """The number of a file's format. Raises as `format_of`."""
    is_ours = schema.equals(schema_with(name for name in OPTIONAL_COLUMNS if name in schema.names))
    return FORMAT if is_ours else format_of(path, schema)


def _read_older(path: Path) -> JournalContents:
    """A journal of an earlier release."""
    lines = list(older_lines(path))
    return JournalContents(
        episodes=tuple(line for _, line in lines if isinstance(line, Episode)),
        damage=tuple(
            f"{path}: line {number} is damaged: {line}" for number, line in lines if isinstance(line, str)
        ),
        num_truncated=0,
    )


def _read_whatever_is_sound(path: Path) -> StoredEpisodes:
    """The same, of a file of no release nothing: what it held is played again. Raises `LaterFormat`."""
    try:
        return read_sound_episodes(path)
    except LaterFormat:
        raise
    except ValueError as fault:
        return StoredEpisodes(episodes=(), damage=(str(fault),))


def _whole_episodes(rows: Iterable[Mapping[str, Any]]) -> Iterator[Episode]:
    """The episodes of which every row is there. Those of one episode stand one behind the other."""
    for _, group in itertools.groupby(rows, key=lambda row: row["episode_id"]):
        of_one = list(group)
        if len(of_one) == max(1, of_one[0]["num_segments"]):
            yield _episode(of_one)


def _said(fault: BaseException) -> str:
    """The first line of what a library says."""
    return (str(fault).splitlines() or [type(fault).__name__])[0]


def _table(
    rows: Sequence[tuple[Episode, int]], schema: pa.Schema, *, step: int, advantages: Mapping[str, float]
) -> pa.Table:
    """The rows of these episodes and places among their segments, with their checksums."""
    plain_schema = pa.schema([field for field in schema if field.name not in ARRAY_COLUMNS])
    plain = pa.Table.from_pylist([_plain_row(*row, step, advantages) for row in rows], schema=plain_schema)
    segments = [episode.segments[place] if episode.segments else None for episode, place in rows]
    columns = [
        _list_array(
            [None if segment is None else _array_of(segment, field.name) for segment in segments], field.type
        )
        if field.name in ARRAY_COLUMNS
        else plain.column(field.name)
        for field in schema
    ]
    table = pa.Table.from_arrays(columns, schema=schema)
    place = schema.get_field_index("checksum")
    checksums = pa.array(row_checksums(table, ARRAY_COLUMNS), pa.uint32())
    return table.set_column(place, schema.field(place), checksums)


def _array_of(segment: Segment, name: str) -> npt.NDArray[Any] | None:
    """What stands in an array column; None: nothing was recorded."""
    if name in ("support_sizes", "support_token_ids"):
        return None if segment.support is None else getattr(segment.support, name.removeprefix("support_"))
    return getattr(segment, name)


def _list_array(arrays: Sequence[npt.NDArray[Any] | None], kind: pa.ListType) -> pa.ListArray:
    """A row for each array, whatever its shape; null for None."""
    flat = [np.zeros(0, dtype=kind.value_type.to_pandas_dtype())]
    flat += [array.reshape(-1) for array in arrays if array is not None]
    offsets = np.cumsum([0, *(0 if array is None else array.size for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets),
        pa.array(np.concatenate(flat), type=kind.value_type),
        type=kind,
        mask=pa.array([array is None for array in arrays], pa.bool_()),
    )


def _plain_row(episode: Episode, place: int, step: int, advantages: Mapping[str, float]) -> dict[str, Any]:
    """All that is no array in the row of one segment, or of an episode without any."""
    role = episode.segments[place].role if episode.segments else ""
    return {
        "step": step,
        "outcome": str(episode.outcome),
        "reward_parts": list(episode.reward_parts.items()),
        "role_rewards": list(episode.role_rewards.items()),
        "metrics": list(episode.metrics.items()),
        "turn_records": [asdict(record) for record in episode.turn_records],
        "tools": [(name, asdict(usage)) for name, usage in episode.tools.items()],
        "messages": orjson.dumps(episode.messages).decode() if place == 0 else None,
        "num_segments": len(episode.segments),
        "segment": place if episode.segments else None,
        "role": role if episode.segments else None,
        "advantage": advantages.get(episode.part_id(role)),
        "checksum": 0,
        "parent_id": episode.parent_id or None,
        "branch_turn": episode.branch_turn if episode.parent_id else None,
        "failed_part": episode.failed_part or None,
        "spans": [
            dict(zip(("kind", "started", "ended"), span, strict=True)) for span in episode.timings.spans
        ]
        if place == 0 and episode.timings.spans
        else None,
        "num_recovered_calls": episode.num_recovered_calls,
        "answer": episode.answer,
        **{name: getattr(episode.timings, name) for name in TIMINGS},
        **{name: getattr(episode, name) for name in PLAIN_COLUMNS},
    }


TIMINGS = ("generate_s", "tools_s", "queue_s", "total_s")
PLAIN_COLUMNS = (
    "episode_id",
    "group_id",
    "env_id",
    "task_id",
    "task_digest",
    "seed",
    "stop_reason",
    "error",
    "reward",
    "group_reward",
    "num_turns",
    "num_tool_calls",
    "num_tool_errors",
    "num_drawn_tokens",
)
"""Columns that are fields of `Episode` as they stand."""


def _episode(rows: Sequence[Mapping[str, Any]]) -> Episode:
    first = rows[0]
    return Episode(
        outcome=Outcome(first["outcome"]),
        reward_parts=dict(first["reward_parts"]),
        role_rewards=dict(first["role_rewards"]),
        metrics=dict(first["metrics"]),
        turn_records=tuple(TurnRecord(**record) for record in first["turn_records"]),
        tools={name: ToolUsage(**usage) for name, usage in first["tools"]},
        messages=tuple(orjson.loads(first["messages"])),
        segments=tuple(_segment(row) for row in rows if row["segment"] is not None),
        timings=EpisodeTimings(
            **{name: first[name] for name in TIMINGS},
            spans=tuple((one["kind"], one["started"], one["ended"]) for one in first.get("spans") or ()),
        ),
        parent_id=first.get("parent_id") or "",
        branch_turn=first.get("branch_turn") or 0,
        failed_part=first.get("failed_part") or "",
        num_recovered_calls=first.get("num_recovered_calls") or 0,
        answer=first.get("answer"),
        **{name: first[name] for name in PLAIN_COLUMNS},
    )


def _segment(row: Mapping[str, Any]) -> Segment:
    """The segment of a row, in memory of its own."""
    routing, support = row.get("routed_experts"), None
    if routing is not None:
        routing = routing.reshape(len(row["token_ids"]), -1).copy()
    if row.get("support_sizes") is not None:
        support = SamplingSupport(
            sizes=row["support_sizes"].copy(), token_ids=row["support_token_ids"].copy()
        )
    taught = row.get("teacher_logprobs")
    columns = {name: row[name].copy() for name in TOKEN_COLUMNS}
    return Segment(
        **columns,
        role=row["role"],
        routed_experts=routing,
        support=support,
        teacher_logprobs=None if taught is None else taught.copy(),
    )
