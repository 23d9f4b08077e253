"""A task sampler of one's own: tasks in their order, a few at a time, and the next one when one of them is learnt."""

from __future__ import annotations

from collections.abc import Sequence

from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks.order import Draw
from polyturn.envs.tasks.rates import SuccessRates


class Staircase:
    """Draws in turn from the `width` tasks of the step that it stands on, and climbs one for each group that is solved.

    Made for sources whose tasks stand in the order of their difficulty.
    """

    def __init__(
        self,
        tasks: TaskSource,
        *,
        seed: int,
        rates: SuccessRates,
        width: int = 16,
        solved_at: float = 0.8,
    ) -> None:
        """`tasks`, `seed` and `rates` are given by the run, the others by `options`."""
        del seed  # nothing is random here
        self._num_tasks = len(tasks)
        self._rates = rates
        self._width = width
        self._solved_at = solved_at
        self._step = 0

    def draw(self, position: int) -> Draw:
        """The task in turn."""
        return Draw((self._step + position % self._width) % self._num_tasks, 0)

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """One step up, where a group survived and its task's success rate is high enough."""
        rate = self._rates.rate(task_index)
        if rewards and rate is not None and rate >= self._solved_at:
            self._step += 1

    def state(self) -> int:
        """The step that it stands on."""
        return self._step

    def restore(self, state: int) -> None:
        """Stand on the step of a checkpoint."""
        self._step = state
