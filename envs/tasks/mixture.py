"""Several sources as one, with weights."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from polyturn.envs.tasks.types import Task, TaskSource, no_such_task


class MixtureTasks:
    """Sources one after the other by position; drawn from in proportion to their weights (`draw_order`).

    A source is not used up: those that are drawn from more often than their size begin another epoch of their own.
    """

    def __init__(
        self,
        sources: Sequence[TaskSource],
        *,
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            sources: At least one, none empty.
            weights: One for each, positive; None: each source's size, as if they were one file.
            names: For messages.

        Raises:
            ValueError: any of this does not hold.
        """
        self.sources = tuple(sources)
        self.names = tuple(names or (f"source {index}" for index in range(len(self.sources))))
        if not self.sources:
            raise ValueError("a mixture needs at least one source")
        for name, source in zip(self.names, self.sources, strict=True):
            if len(source) == 0:
                raise ValueError(f"{name}: the source is empty")
        self.weights = tuple(map(float, weights if weights is not None else map(len, self.sources)))
        if len(self.weights) != len(self.sources):
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.sources)} sources: there must be one each"
            )
        for name, weight in zip(self.names, self.weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"{name}: a weight must be a positive number, not {weight:g}")
        self._starts = [0, *itertools.accumulate(len(source) for source in self.sources)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no task {index}, the mixture has {len(self)}")
        source = bisect.bisect_right(self._starts, index) - 1
        return self.sources[source][index - self._starts[source]]

    def start(self, source: int) -> int:
        """The position of a source's first task."""
        return self._starts[source]

    def find(self, task_id: str) -> Task:
        """The task with that id, of the first source that has it. Raises `ValueError` if none has."""
        for source in self.sources:
            find = getattr(source, "find", None)
            try:
                if find is not None:
                    return find(task_id)
            except ValueError:
                continue
        raise no_such_task(task_id)
