"""The short columns of a trajectory file once more, in one piece in its footer.

In the file itself a few rows at a time are compressed and checked, so that damage costs few episodes; whoever lists a
hundred thousand of them would open as many small pieces for each column. The summary has one row for each episode and
no message and no token. It stands behind its checksum. A file without one is read column by column.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import pyarrow as pa

SUMMARY = b"polyturn_summary"
"""In a trajectory file's footer."""
LEFT_OUT = frozenset({"messages", "turn_records", "checksum", "segment", "role"})
"""Columns that belong to a segment, or are long."""
CHECKSUM_BYTES = 4


def summary_schema(columns: pa.Schema, optional: Mapping[str, pa.DataType]) -> pa.Schema:
    """The columns of a summary: those of a file but its lists of numbers and those that are left out."""
    fields = [field for field in columns if field.name not in LEFT_OUT and not pa.types.is_list(field.type)]
    return pa.schema([*fields, *(pa.field(name, kind) for name, kind in optional.items())])


def packed(table: pa.Table) -> bytes:
    """A summary as it stands in the footer."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    body = sink.getvalue().to_pybytes()
    return zlib.crc32(body).to_bytes(CHECKSUM_BYTES) + body


def unpacked(metadata: Mapping[bytes, bytes] | None, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The summary in a footer's metadata, or these columns of it; None where it is not there as it was written."""
    content = (metadata or {}).get(SUMMARY, b"")
    checksum, body = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
    if not body or zlib.crc32(body).to_bytes(CHECKSUM_BYTES) != checksum:
        return None
    # The others are not decompressed; threads cost more than so little is worth.
    options = pa.ipc.IpcReadOptions(use_threads=False)
    if columns is not None:
        names = pa.ipc.open_stream(body).schema.names
        options.included_fields = [names.index(name) for name in columns if name in names]
    return pa.ipc.open_stream(body, options=options).read_all()
