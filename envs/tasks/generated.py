"""Tasks that a function makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from polyturn.envs.tasks.rows import RowReader
from polyturn.envs.tasks.types import Task, no_such_task

ENDLESS = 1 << 62
"""The length of a source without an end: no run comes to it."""
SIGNATURE = "def generate(index: int, seed: int) -> Task | Mapping[str, Any]"

Generator = Callable[[int, int], Task | Mapping[str, Any]]
"""Task `index` of the sequence that `seed` names: the same arguments give the same task."""


class GeneratedTasks:
    """Tasks of a procedure, made when they are asked for. With no size there is no end to them.

    A mapping that the function returns is read as a row of a task file.
    """

    def __init__(
        self,
        function: Generator,
        *,
        size: int | None = None,
        seed: int = 0,
        name: str | None = None,
        reader: RowReader | None = None,
    ) -> None:
        """
        Raises:
            ValueError: the function has another signature, or does not give the same task twice, or `size` is below 1.
        """
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        if size is not None and size < 1:
            raise ValueError(f"{self.name}: size must be at least 1, or None for no end, not {size}")
        _check_signature(function, self.name)
        self._function = function
        self._size = size
        self._seed = seed
        self._reader = reader or RowReader()
        if self[0] != self[0]:
            raise ValueError(
                f"{self.name}: task 0 was another one when made again; a task must follow from index and seed alone"
            )

    @property
    def is_endless(self) -> bool:
        return self._size is None

    def __len__(self) -> int:
        return ENDLESS if self._size is None else self._size

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: there is no task {index}, there are {len(self)}")
        made: Any = self._function(index, self._seed)
        if isinstance(made, Task):
            return made
        if not isinstance(made, Mapping):
            raise ValueError(f"{self.name}: it must return a Task or a mapping, not {type(made).__name__}")
        return self._reader.read(
            dict(made), f"{self.name}: task {index}", default_id=f"{self.name}-{self._seed}-{index}"
        )

    def find(self, task_id: str) -> Task:
        """The task with that id, if its id ends in its index. Raises `ValueError` if there is none."""
        number = task_id.rpartition("-")[2]
        if number.isdecimal() and int(number) < len(self) and self[int(number)].task_id == task_id:
            return self[int(number)]
        raise no_such_task(task_id)


def _check_signature(function: Any, name: str) -> None:
    try:
        inspect.signature(function).bind(0, 0)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; a generator of tasks is\n    {SIGNATURE}") from error
