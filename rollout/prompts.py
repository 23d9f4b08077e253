"""Which task is played next: a seeded shuffle of the tasks per epoch, with a position that a checkpoint can keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One draw of a task. Everything in it follows from the cursor's seed and `position`."""

    task_index: int
    epoch: int
    position: int
    """How many prompts were drawn before this one, over the whole run."""
    group_id: str
    """The identity that the episodes of this prompt share."""


class PromptCursor:
    """Draws prompts without end, every task once per epoch.

    A cursor made with the `position` of another goes on exactly where that one stood.
    """

    def __init__(self, num_tasks: int, *, seed: int, position: int = 0) -> None:
        """Raises `ValueError` for an empty task source."""
        if num_tasks < 1:
            raise ValueError("the task source is empty: there is nothing to train on")
        self._num_tasks = num_tasks
        self._seed = seed
        self._position = position
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    @property
    def position(self) -> int:
        """How many prompts have been drawn."""
        return self._position

    def take(self, num_prompts: int) -> list[Prompt]:
        """Draw the next prompts."""
        return [self._next() for _ in range(num_prompts)]

    def _next(self) -> Prompt:
        epoch, index = divmod(self._position, self._num_tasks)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._num_tasks)
        prompt = Prompt(
            task_index=int(self._order[index]),
            epoch=epoch,
            position=self._position,
            group_id=f"g{self._position:08d}",
        )
        self._position += 1
        return prompt
