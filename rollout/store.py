"""The trajectories of a run: a journal of the step under way, and one columnar file per finished step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.rollout.journal import Journal, read_journal
from polyturn.tools.metrics import ToolUsage

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
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("stop_reason", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("reward_parts", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("role_rewards", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("metrics", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("advantage", pa.float64()),
        pa.field("num_turns", pa.int32(), nullable=False),
        pa.field("turn_records", pa.list_(TURN_RECORD), nullable=False),
        pa.field("num_tool_calls", pa.int32(), nullable=False),
        pa.field("num_tool_errors", pa.int32(), nullable=False),
        pa.field("tools", pa.map_(pa.string(), TOOL_USAGE), nullable=False),
        pa.field("generate_s", pa.float64(), nullable=False),
        pa.field("tools_s", pa.float64(), nullable=False),
        pa.field("queue_s", pa.float64(), nullable=False),
        pa.field("total_s", pa.float64(), nullable=False),
        pa.field("messages", pa.string()),
        pa.field("segment", pa.int32()),
        pa.field("role", pa.string()),
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("sampled", pa.list_(pa.bool_())),
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("policy_versions", pa.list_(pa.int32())),
        pa.field("turns", pa.list_(pa.int16())),
    ],
    metadata={"polyturn_trajectories": "1"},
)
TOKEN_COLUMNS = ("token_ids", "sampled", "logprobs", "policy_versions", "turns")
ROUTING_COLUMN = "routed_experts"
SCHEMA_WITH_ROUTING = SCHEMA.append(pa.field(ROUTING_COLUMN, pa.list_(pa.string())))
"""Of files whose engine recorded the experts of each token."""


class TrajectoryStore:
    """Trajectories under `directory`: `trajectories/step_000001.parquet`, `journal/step_000002.jsonl`.

    An episode is safe from the moment `journal` returns; `write_step` turns a finished step into its columnar file.
    """

    def __init__(self, directory: Path) -> None:
        self._trajectories = directory / "trajectories"
        self._journals = directory / "journal"
        self._open: tuple[int, Journal] | None = None

    def path(self, step: int) -> Path:
        """The columnar file of a step."""
        return self._trajectories / f"step_{step:06d}.parquet"

    def steps(self) -> list[int]:
        """The steps that have a columnar file, in order."""
        return sorted(
            int(path.stem.removeprefix("step_")) for path in self._trajectories.glob("step_*.parquet")
        )

    def journal(self, step: int, episode: Episode) -> None:
        """Keep one attempt of the step under way, failed or not."""
        if self._open is None or self._open[0] != step:
            self._close_journal()
            self._open = (step, Journal(self._journal_path(step)))
        self._open[1].append(episode)

    def journaled(self, step: int) -> list[Episode]:
        """The attempts of a step that was begun before: from its journal, or its columnar file if it got so far."""
        contents = read_journal(self._journal_path(step))
        if contents.episodes or not self.path(step).exists():
            return list(contents.episodes)
        return self.read_step(step)

    def write_step(
        self, step: int, episodes: Sequence[Episode], *, advantages: Mapping[str, float] | None = None
    ) -> Path:
        """Write the step's columnar file, all of it or nothing, and drop its journal.

        `advantages` are by `Episode.part_id`, of the whole or of one role; what has none has null.
        """
        path = self.path(step)
        write_episodes(path, episodes, step=step, advantages=advantages)
        self._close_journal()
        self._journal_path(step).unlink(missing_ok=True)
        return path

    def read_step(self, step: int) -> list[Episode]:
        """The episodes of a finished step, in the order in which they were written."""
        return read_episodes(self.path(step))

    def discard_after(self, step: int) -> None:
        """Remove what was kept of later steps."""
        self._close_journal()
        for path in (*self._trajectories.glob("step_*.parquet"), *self._journals.glob("step_*.jsonl")):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def close(self) -> None:
        """Close the journal."""
        self._close_journal()

    def _journal_path(self, step: int) -> Path:
        return self._journals / f"step_{step:06d}.jsonl"

    def _close_journal(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None


def write_episodes(
    path: Path, episodes: Sequence[Episode], *, step: int, advantages: Mapping[str, float] | None = None
) -> None:
    """Write a columnar file of episodes that is either complete or not there."""
    rows = [row for episode in episodes for row in _rows(step, episode, advantages or {})]
    has_routing = any(segment.routed_experts for episode in episodes for segment in episode.segments)
    table = pa.Table.from_pylist(rows, schema=SCHEMA_WITH_ROUTING if has_routing else SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a columnar file. Raises `ValueError` if it is not one of ours."""
    table = pq.read_table(path)
    if not (table.schema.equals(SCHEMA) or table.schema.equals(SCHEMA_WITH_ROUTING)):
        raise ValueError(f"{path} does not have the columns of a trajectory file of this version")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault(row["episode_id"], []).append(row)
    return [_episode(of_one) for of_one in rows.values()]


def _rows(step: int, episode: Episode, advantages: Mapping[str, float]) -> list[dict[str, Any]]:
    common = {
        "step": step,
        "outcome": str(episode.outcome),
        "reward_parts": list(episode.reward_parts.items()),
        "role_rewards": list(episode.role_rewards.items()),
        "metrics": list(episode.metrics.items()),
        "turn_records": [asdict(record) for record in episode.turn_records],
        "tools": [(name, asdict(usage)) for name, usage in episode.tools.items()],
        "generate_s": episode.timings.generate_s,
        "tools_s": episode.timings.tools_s,
        "queue_s": episode.timings.queue_s,
        "total_s": episode.timings.total_s,
        **{name: getattr(episode, name) for name in PLAIN_COLUMNS},
    }
    rows: list[dict[str, Any]] = [
        {
            **common,
            "segment": index,
            "role": segment.role,
            "advantage": advantages.get(episode.part_id(segment.role)),
            **{name: getattr(segment, name) for name in (*TOKEN_COLUMNS, ROUTING_COLUMN)},
        }
        for index, segment in enumerate(episode.segments)
    ] or [{**common, "segment": None, "advantage": advantages.get(episode.episode_id)}]
    rows[0]["messages"] = orjson.dumps(episode.messages).decode()
    return rows


PLAIN_COLUMNS = (
    "episode_id",
    "group_id",
    "env_id",
    "task_id",
    "seed",
    "stop_reason",
    "error",
    "reward",
    "num_turns",
    "num_tool_calls",
    "num_tool_errors",
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
        segments=tuple(
            Segment(
                **{name: tuple(row[name]) for name in TOKEN_COLUMNS},
                role=row["role"],
                routed_experts=tuple(row.get(ROUTING_COLUMN) or ()),
            )
            for row in rows
            if row["segment"] is not None
        ),
        timings=EpisodeTimings(
            **{name: first[name] for name in ("generate_s", "tools_s", "queue_s", "total_s")}
        ),
        **{name: first[name] for name in PLAIN_COLUMNS},
    )
