"""Episodes as Parquet with typed columns, which `datasets.load_dataset("parquet", data_files=...)` loads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from polyturn.rollout.evaluation.export.openai_rows import metadata_of, openai_messages
from polyturn.rollout.evaluation.export.stored import StoredEpisode, StoredPart
from polyturn.rollout.whole_file import whole_file

ROWS_PER_GROUP = 256
"""In memory at once."""
CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("name", pa.string()),
        ("tool_calls", pa.list_(CALL)),
        ("tool_call_id", pa.string()),
    ]
)
NAMED_VALUE = pa.struct([("name", pa.string()), ("value", pa.float64())])
"""`datasets` knows no maps."""
SEGMENT = pa.struct(
    [
        ("role", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("policy_versions", pa.list_(pa.int32())),
        ("turns", pa.list_(pa.int16())),
    ]
)
SCHEMA = pa.schema(
    [
        ("episode_id", pa.string()),
        ("entry", pa.string()),
        ("step", pa.int64()),
        ("environment", pa.string()),
        ("task_id", pa.string()),
        ("task_digest", pa.string()),
        ("task_index", pa.int64()),
        ("sample", pa.int64()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("failure", pa.string()),
        ("answer", pa.string()),
        ("outcome", pa.string()),
        ("stop_reason", pa.string()),
        ("error", pa.string()),
        ("num_turns", pa.int64()),
        ("num_tool_calls", pa.int64()),
        ("num_tool_errors", pa.int64()),
        ("generate_s", pa.float64()),
        ("tools_s", pa.float64()),
        ("queue_s", pa.float64()),
        ("total_s", pa.float64()),
        ("reward_parts", pa.list_(NAMED_VALUE)),
        ("metrics", pa.list_(NAMED_VALUE)),
        ("messages", pa.list_(MESSAGE)),
        ("tools", pa.string()),
        ("segments", pa.list_(SEGMENT)),
    ]
)


def parquet_row(stored: StoredEpisode) -> dict[str, Any]:
    """A row of `SCHEMA`; `tools` is JSON, because every tool has parameters of its own form."""
    row = metadata_of(stored)
    for name in ("reward_parts", "metrics"):
        row[name] = [{"name": key, "value": value} for key, value in row[name].items()]
    return {
        **row,
        "messages": openai_messages(stored.episode.messages),
        "tools": orjson.dumps(list(stored.tools)).decode() if stored.tools else None,
        "segments": [
            {name: getattr(segment, name) for name in SEGMENT.names} for segment in stored.episode.segments
        ],
    }


def write_parquet(part: StoredPart, output: Path) -> int:
    """Write a part's episodes as one Parquet file, whole or not at all; how many."""
    rows, number = map(parquet_row, part.stream()), 0
    with whole_file(output) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema=SCHEMA))
            number += len(group)
    return number
