"""Task files that may be larger than memory, JSONL and Parquet: rows are read when they are asked for."""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from polyturn.envs.messages import Task, no_such_task
from polyturn.envs.tasks.rows import RowReader

_MAX_SUGGESTED_FROM = 10_000
"""Sources up to this size are searched for the id that was probably meant."""


class FileTasks(ABC):
    """Tasks of one file. The file must not change while it is open.

    Memory holds 16 bytes for each row, whatever the rows hold.
    """

    def __init__(self, path: str | Path, *, reader: RowReader | None, check_rows: int | None) -> None:
        """Raises `ValueError` (`path:row: ...`) for the first of `check_rows` rows (None: of all) that is wrong."""
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such task file")
        self.num_checked = check_rows
        """So many rows are looked at before a run; None: all."""
        self._reader = reader or RowReader()
        self._open()
        if len(self) == 0:
            raise ValueError(f"{self.path}: the file holds no task")
        if check_rows is None:
            self._ids  # noqa: B018  reads every row
            self._check_ids()
        else:
            for index in range(min(check_rows, len(self))):
                self[index]

    @abstractmethod
    def _open(self) -> None:
        """Find the rows; raises `ValueError` for a file that cannot be read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> Task:
        """The task of a row that is there."""

    @abstractmethod
    def _line(self, index: int) -> int:
        """The number of a row in messages, from 1."""

    def _read_all(self) -> Iterator[Task]:
        return (self._read(index) for index in range(len(self)))

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: there is no task {index}, there are {len(self)}")
        return self._read(index)

    def where(self, index: int) -> str:
        """`path:line` of a task, for messages."""
        return f"{self.path}:{self._line(index)}"

    def find(self, task_id: str) -> Task:
        """The task with that id. Raises `ValueError` if there is none."""
        for index in np.flatnonzero(self._ids == _hash(task_id)):
            task = self[int(index)]
            if task.task_id == task_id:
                return task
        known = (task.task_id for task in self._read_all()) if len(self) <= _MAX_SUGGESTED_FROM else ()
        raise no_such_task(task_id, known)

    @functools.cached_property
    def _ids(self) -> np.ndarray:
        """A 64-bit hash of every row's id."""
        return np.fromiter(
            (_hash(task.task_id) for task in self._read_all()), dtype=np.int64, count=len(self)
        )

    def _check_ids(self) -> None:
        order = np.argsort(self._ids, kind="stable")
        hashes = self._ids[order]
        seconds = np.sort(order[1:][hashes[1:] == hashes[:-1]])
        for second in seconds:
            task = self._read(int(second))
            for first in np.flatnonzero(self._ids[:second] == self._ids[second]):
                if self._read(int(first)).task_id == task.task_id:
                    raise ValueError(
                        f"{self.path}:{self._line(int(second))}: line {self._line(int(first))} already has the id "
                        f"{task.task_id!r}"
                    )


def _hash(task_id: str) -> int:
    return hash(task_id)


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


CACHE_BYTES = 256 << 20


class ParquetTasks(FileTasks):
    """Tasks of a Parquet file, whose columns are the keys of a JSONL row.

    Row groups are read when one of their rows is asked for, and the last ones are kept, up to `cache_bytes`. A file
    that is larger than that and read in a shuffled order wants small row groups (1,000 rows).

    Raises:
        ValueError: `path:row: ...` for a row that cannot be read; a file that is missing, empty or not Parquet.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        reader: RowReader | None = None,
        check_rows: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """As `JsonlTasks`."""
        self._cache_bytes = cache_bytes
        super().__init__(path, reader=reader, check_rows=check_rows)

    def _open(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(self.path, memory_map=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}: not a Parquet file: {error}") from error
        self._reader.check_keys(self._file.schema_arrow.names, str(self.path))
        # Columns that no key names, and that are not kept, are not read.
        keep_all = self._reader.keys.others == "keep"
        known = self._reader.keys.columns
        self._columns = [n for n in self._file.schema_arrow.names if keep_all or n in known]
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._groups: OrderedDict[int, Any] = OrderedDict()
        # A ParquetFile is not safe to read from several threads.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _read(self, index: int) -> Task:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[group])
        return self._task(self._group(group).slice(row, 1).to_pylist()[0], index)

    def _read_all(self) -> Iterator[Task]:
        index = 0
        with self._lock:
            for batch in self._file.iter_batches(batch_size=1024, columns=self._columns):
                for row in batch.to_pylist():
                    yield self._task(row, index)
                    index += 1

    def _line(self, index: int) -> int:
        return index + 1

    def _task(self, row: dict[str, Any], index: int) -> Task:
        # A column that only some rows use is null in the others, as if the key were not there.
        present = {key: value for key, value in row.items() if value is not None}
        where = f"{self.path}:{index + 1}"
        return self._reader.read(present, where, default_id=f"{self.path.stem}-{index + 1}")

    def _group(self, group: int) -> Any:
        with self._lock:
            table = self._groups.pop(group, None)
            if table is None:
                table = self._file.read_row_group(group, columns=self._columns)
            self._groups[group] = table
            while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > self._cache_bytes:
                self._groups.popitem(last=False)
            return table
