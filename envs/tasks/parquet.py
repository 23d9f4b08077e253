"""Tasks of Parquet files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from polyturn.envs.tasks.files import FileTasks
from polyturn.envs.tasks.rows import RowReader
from polyturn.envs.tasks.types import Task

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
