"""Tasks that a seed makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from polyturn.envs.tasks import Task
from polyturn.envs.tasks.splits import known_split

FIRST_SEED: Mapping[str, int] = {"train": 0, "validation": 1 << 29, "heldout": 1 << 30}
"""Where the seeds of a split begin."""

MAX_SIZE = 1 << 29


def check_split(split: str) -> None:
    """Raises ValueError for a split that does not exist."""
    known_split(split, FIRST_SEED)


def check_size(size: int) -> None:
    """Raises ValueError for a size that splits have no room for."""
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be from 1 to {MAX_SIZE}, not {size}")


class SeededTasks:
    """Task i of a split is made of the split's seed i. Ids are `name/split/i`."""

    def __init__(self, name: str, split: str, size: int, make: Callable[[str, int], Task]) -> None:
        """
        Args:
            name: What the ids begin with.
            split: `train`, `validation` or `heldout`.
            size: How many.
            make: The task of an id and a seed.
        """
        check_split(split)
        check_size(size)
        self._name, self._split, self._size, self._make = name, split, size, make

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        return self._make(f"{self._name}/{self._split}/{index}", FIRST_SEED[self._split] + index)

    def find(self, task_id: str) -> Task:
        """The task of that id. Raises ValueError where there is none."""
        prefix, _, index = task_id.rpartition("/")
        known = prefix == f"{self._name}/{self._split}" and index.isdecimal() and len(index) < 12
        if not known or int(index) >= self._size:
            raise ValueError(f"no task {task_id!r}; ids look like {self._name}/{self._split}/0")
        return self[int(index)]
