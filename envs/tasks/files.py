"""Task files that are larger than memory: rows are read when they are asked for."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from polyturn.envs.tasks.rows import RowReader
from polyturn.envs.tasks.types import Task, no_such_task

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
