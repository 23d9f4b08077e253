"""Tasks of JSONL files."""

from __future__ import annotations

import json
import os
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from polyturn.envs.tasks.files import FileTasks
from polyturn.envs.tasks.rows import RowReader
from polyturn.envs.tasks.types import Task

_CHUNK = 8 << 20
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
"""Integers that orjson would read as floats."""


class JsonlTasks(FileTasks):
    """Tasks of a JSONL file: rows `{"prompt": str or messages, "answer" or "label": ..., "id"?, "metadata"?}`.

    A row without an id is named after the file and its line. `RowKeys` names the keys otherwise.

    Raises:
        ValueError: `path:line: ...` for a row that cannot be read; a file that is missing or empty.
    """

    def __init__(
        self, path: str | Path, *, reader: RowReader | None = None, check_rows: int | None = None
    ) -> None:
        """
        Args:
            path: The file.
            reader: Makes tasks of rows.
            check_rows: Read so many rows at once; None reads all, which finds every mistake before anything starts.
        """
        super().__init__(path, reader=reader, check_rows=check_rows)

    def _open(self) -> None:
        # Read by offset, not mapped: a mapping of a file that is cut short ends the process.
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._starts, self._lines = _find_rows(self._file)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _read(self, index: int) -> Task:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        return self._parse(os.pread(self._file, end - start, start), index)

    def _read_all(self) -> Iterator[Task]:
        offset, data = 0, b""
        for index in range(len(self)):
            start, end = int(self._starts[index]), int(self._starts[index + 1])
            if end > offset + len(data):
                offset, data = start, os.pread(self._file, max(_CHUNK, end - start), start)
            yield self._parse(data[start - offset : end - offset], index)

    def _parse(self, line: bytes, index: int) -> Task:
        number = self._line(index)
        where = f"{self.path}:{number}"
        return self._reader.read(_load(line, where), where, default_id=f"{self.path.stem}-{number}")

    def _line(self, index: int) -> int:
        return index + 1 if self._lines is None else int(self._lines[index])


def _find_rows(file: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Where each line that is not blank starts, and where the last ends; their line numbers where some are blank."""
    size = os.fstat(file).st_size
    breaks = [np.zeros(1, dtype=np.int64)]
    first_bytes = [np.frombuffer(os.pread(file, 1, 0), dtype=np.uint8)]
    for offset in range(0, size, _CHUNK):
        # One byte more, so that the byte after a newline is always there.
        data = np.frombuffer(os.pread(file, _CHUNK + 1, offset), dtype=np.uint8)
        after = np.flatnonzero(data[:_CHUNK] == 10) + 1
        after = after[after < len(data)]
        breaks.append(after + offset)
        first_bytes.append(data[after])
    starts = np.concatenate(breaks)
    if size == 0:
        return starts, None
    blank = np.isin(np.concatenate(first_bytes), np.frombuffer(b" \t\r\n\x0b\x0c", dtype=np.uint8))
    ends = np.append(starts[1:], size)
    for index in np.flatnonzero(blank):
        start, end = int(starts[index]), int(ends[index])
        blank[index] = not os.pread(file, end - start, start).strip()
    lines = np.flatnonzero(~blank) + 1 if blank.any() else None
    return np.append(starts[~blank], size), lines


def _load(line: bytes, where: str) -> Any:
    try:
        if not _LONG_NUMBER.search(line):
            return orjson.loads(line)
        return json.loads(line, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON value")
