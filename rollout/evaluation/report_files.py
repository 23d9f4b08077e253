"""An evaluation's report on disk: `report.json`, and `episodes.parquet` with an episode in each row."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from polyturn.rollout.evaluation.directory import REPORT
from polyturn.rollout.evaluation.records import Evaluation, ScoredEpisode
from polyturn.rollout.evaluation.report import Report
from polyturn.rollout.whole_file import whole_file

EPISODES_TABLE = "episodes.parquet"
SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("task_index", pa.int64()),
        ("sample", pa.int64()),
        ("task_id", pa.string()),
        ("task_digest", pa.string()),
        ("seed", pa.int64()),
        ("episode_id", pa.string()),
        ("failure", pa.string()),
        ("score", pa.float64()),
        ("answer", pa.string()),
        ("outcome", pa.string()),
        ("stop_reason", pa.string()),
        ("num_turns", pa.int64()),
        ("num_prompt_tokens", pa.int64()),
        ("num_completion_tokens", pa.int64()),
        ("num_tool_calls", pa.int64()),
        ("num_tool_errors", pa.int64()),
        ("generate_s", pa.float64()),
        ("tools_s", pa.float64()),
        ("queue_s", pa.float64()),
        ("total_s", pa.float64()),
        ("cost", pa.float64()),
        ("metrics", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),
    ]
)
"""Of `episodes.parquet`: the fields of `ScoredEpisode`. What has no score, answer, cost or error has a null there."""


def write_report(directory: Path, evaluation: Evaluation, report: Report) -> None:
    """Write both files, each whole or not at all. Raises `OSError` where the directory does not take them."""
    with whole_file(directory / REPORT) as file:
        file.write(report_json(report))
    with whole_file(directory / EPISODES_TABLE) as file:
        pq.write_table(episodes_table(evaluation), file, compression="zstd")


def report_json(report: Report) -> bytes:
    """What `report.json` holds."""
    return orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def episodes_table(evaluation: Evaluation) -> pa.Table:
    """A row for each episode that holds, in the order of entries, tasks and samples."""
    rows = [
        episode
        for entry in evaluation.entries
        for episode in sorted(entry.episodes, key=lambda episode: (episode.task_index, episode.sample))
    ]
    return pa.table({name: [_value(row, name) for row in rows] for name in SCHEMA.names}, schema=SCHEMA)


def _value(episode: ScoredEpisode, name: str) -> object:
    value = getattr(episode, name)
    return list(value.items()) if name == "metrics" else value
