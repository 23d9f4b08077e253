"""An admission gate of one's own: each task a fixed number of times, however large a part of the draws it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks.rates import SuccessRates


class FreshOnly:
    """Admits every task `times` times."""

    def __init__(self, tasks: TaskSource, *, rates: SuccessRates, times: int = 1) -> None:
        """`tasks` and `rates` are given by the run, `times` by `options`."""
        del tasks, rates
        self._times = times
        self._admitted: Counter[int] = Counter()

    def admits(self, task_index: int) -> bool:
        """Whether it was admitted fewer times than that."""
        if self._admitted[task_index] >= self._times:
            return False
        self._admitted[task_index] += 1
        return True

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """What came of it does not matter; but a task whose episodes all failed gets another chance."""
        if not rewards:
            self._admitted[task_index] -= 1

    def state(self) -> Mapping[str, int]:
        """How often each was admitted."""
        return {str(index): count for index, count in self._admitted.items()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Know what a checkpoint knew."""
        self._admitted = Counter({int(index): count for index, count in state.items()})
