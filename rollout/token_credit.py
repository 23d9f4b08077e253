"""What a step of training made of each token, one columnar file for each step beside its trajectories.

    token_credit/step_000001.parquet    a row for each segment that was trained on

Its columns have a value for each sampled token of the segment, in order; what no part of the algorithm gave is null.
They are for people who look at a run: nothing that is trained or resumed reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from polyturn.rollout.whole_file import whole_file

ROWS_PER_GROUP = 64
UNREADABLE = (OSError, ValueError, KeyError, OverflowError, MemoryError, pa.ArrowException)
"""What pyarrow raises where bytes are not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCredit:
    """Of the n sampled tokens of one segment; each column is [n], or None."""

    proximal_logprobs: npt.NDArray[np.float32] | None = None
    """Of the policy at the start of the step."""
    reference_logprobs: npt.NDArray[np.float32] | None = None
    advantages: npt.NDArray[np.float32] | None = None
    correction_weights: npt.NDArray[np.float32] | None = None
    """What the policy's loss is multiplied by; 0: rejected. None: nothing is corrected."""
    clipped: npt.NDArray[np.bool_] | None = None
    """Whether a correction or the policy's loss bounds it before the first update."""


COLUMNS: Mapping[str, pa.DataType] = {
    field.name: pa.list_(pa.bool_() if field.name == "clipped" else pa.float32())
    for field in fields(TokenCredit)
}
SCHEMA = pa.schema(
    [
        pa.field("episode_id", pa.string(), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),
        *(pa.field(name, kind) for name, kind in COLUMNS.items()),
    ]
)


def token_credit_path(directory: Path, step: int) -> Path:
    """Of a step of the run in `directory`."""
    return directory / "token_credit" / f"step_{step:06d}.parquet"


def write_token_credit(path: Path, rows: Iterable[tuple[str, int, TokenCredit]]) -> None:
    """Write the file of a step, of (episode id, segment, what became of its tokens), all of it or nothing."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    encodings = {
        f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("proximal_logprobs", "reference_logprobs")
    }
    dictionary = ["episode_id", "advantages.list.element", "correction_weights.list.element"]
    with (
        whole_file(path) as file,
        pq.ParquetWriter(
            file, SCHEMA, compression="zstd", use_dictionary=dictionary, column_encoding=encodings
        ) as writer,
    ):
        for start in range(0, len(rows), ROWS_PER_GROUP):
            writer.write_table(_table(rows[start : start + ROWS_PER_GROUP]))


def _table(rows: Sequence[tuple[str, int, TokenCredit]]) -> pa.Table:
    columns: dict[str, Any] = {
        "episode_id": [episode_id for episode_id, _, _ in rows],
        "segment": [segment for _, segment, _ in rows],
    }
    for name in COLUMNS:
        columns[name] = [getattr(credit, name) for _, _, credit in rows]
    return pa.Table.from_pydict(columns, schema=SCHEMA)


def read_token_credit(path: Path, episode_id: str) -> dict[int, TokenCredit]:
    """Of one episode, by segment; empty where it was not trained on, or the file is not there or damaged."""
    found: dict[int, TokenCredit] = {}
    try:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["episode_id"]).column("episode_id")
            if episode_id in ids.to_pylist():
                rows = _credits(file.read_row_group(group))
                found |= {segment: credit for whose, segment, credit in rows if whose == episode_id}
    except UNREADABLE:
        return found
    return found


def read_all_token_credit(path: Path) -> Iterator[tuple[str, int, TokenCredit]]:
    """Of all segments; those that can be read of a file that is damaged, and none of one that is not there."""
    try:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield from _credits(file.read_row_group(group))
    except UNREADABLE:
        return


def _credits(table: pa.Table) -> Iterator[tuple[str, int, TokenCredit]]:
    """Raises as pyarrow does, and `ValueError` for columns that are not these."""
    if table.schema != SCHEMA:
        raise ValueError("no file of token credit")
    arrays = {name: table.column(name).combine_chunks() for name in COLUMNS}
    plain = table.select(["episode_id", "segment"]).to_pylist()
    for place, row in enumerate(plain):
        values = {
            name: array[place].values.to_numpy(zero_copy_only=False) if array[place].is_valid else None
            for name, array in arrays.items()
        }
        yield row["episode_id"], row["segment"], TokenCredit(**values)
