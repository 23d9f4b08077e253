"""Rows of Arrow tables as Python values and arrays, and their checksums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import orjson
import pyarrow as pa


def sound_rows(table: pa.Table, arrays: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that have the checksum that they were written with, as `rows_of` gives them."""
    checksums = row_checksums(table, arrays)
    return [
        row for row, found in zip(rows_of(table, arrays), checksums, strict=True) if row["checksum"] == found
    ]


def rows_of(table: pa.Table, arrays: Sequence[str]) -> list[dict[str, Any]]:
    """The rows, each with the arrays of these list columns, or None, under their names."""
    values = {name: _values(table.column(name)) for name in arrays if name in table.column_names}
    plain = table.drop_columns(list(values)).to_pylist()
    return [
        {**row, **{name: of_all[index] for name, of_all in values.items()}} for index, row in enumerate(plain)
    ]


def row_checksums(table: pa.Table, arrays: Sequence[str]) -> list[int]:
    """The CRC-32 of each row's values but `checksum`: of the numbers of its arrays and of the rest as JSON."""
    names = [name for name in arrays if name in table.column_names]
    columns = [_values(table.column(name)) for name in names]
    found = []
    for index, row in enumerate(table.drop_columns([*names, "checksum"]).to_pylist()):
        value = zlib.crc32(orjson.dumps(row))
        for values in columns:
            array = values[index]
            value = value if array is None else zlib.crc32(array.tobytes(), value)
        found.append(value)
    return found


def _values(column: pa.ChunkedArray) -> list[npt.NDArray[Any] | None]:
    """The array of each row, None where there is null."""
    found: list[npt.NDArray[Any] | None] = []
    for chunk in column.chunks:
        starts = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)
        found += [
            values[start:end] if is_there else None
            for start, end, is_there in zip(
                starts[:-1], starts[1:], chunk.is_valid().to_pylist(), strict=True
            )
        ]
    return found
