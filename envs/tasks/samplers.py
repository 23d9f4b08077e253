"""Which task stands at each position of a run, where that may depend on how the tasks before it went."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Protocol

import numpy as np

from polyturn.configs.schema.curriculum import (
    CurriculumConfig,
    DifficultySampler,
    MixtureSampler,
    SequentialSampler,
    ShuffleSampler,
)
from polyturn.configs.schema.section import Plugin
from polyturn.envs.messages import TaskSource
from polyturn.envs.plugins import Signature, make_part
from polyturn.envs.tasks.order import Draw, DrawOrder, ShuffledOrder, draw_order
from polyturn.envs.tasks.rates import SuccessRates


class TaskSampler(Protocol):
    """Draws the tasks of a run.

    A class that is a plug-in is made as `Sampler(tasks, seed=..., rates=..., **options)`: the source that it draws
    from, the run's seed, and the success rates that the run keeps up to date, to be read alone.
    """

    def draw(self, position: int) -> Draw:
        """What is drawn next, the `position`-th draw of all. Called once for each position, in their order."""
        ...

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """What came of a draw: the rewards of the episodes that did not fail, of which there may be none.

        Called once for each draw, in the order in which groups are trained on or left out, and at once without rewards
        for those that the gate passes over; `rates` know it already.
        """
        ...

    def state(self) -> Any:
        """All that draws follow from beside position, seed and `rates`, as JSON has it."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave, with the rates of that moment."""
        ...


METHODS = {
    "draw": Signature(
        what="sampler's `draw`",
        arguments=("position",),
        text="def draw(self, position: int) -> Draw",
        wrong_results=(str, bytes, float, int, bool, NoneType),
    ),
    "observe": Signature(
        what="sampler's `observe`",
        arguments=("task_index", "rewards"),
        text="def observe(self, task_index: int, rewards: Sequence[float]) -> None",
        wrong_results=(),
    ),
    "state": Signature(
        what="sampler's `state`",
        arguments=(),
        text="def state(self) -> Any",
        wrong_results=(),
    ),
    "restore": Signature(
        what="sampler's `restore`",
        arguments=("state",),
        text="def restore(self, state: Any) -> None",
        wrong_results=(),
    ),
}


class SequentialOrder:
    """Every task in its order, epoch after epoch."""

    def __init__(self, num_tasks: int) -> None:
        """Raises `ValueError` for an empty task source."""
        if num_tasks < 1:
            raise ValueError("the task source is empty: there is nothing to train on")
        self._num_tasks = num_tasks

    def __getitem__(self, position: int, /) -> Draw:
        epoch, index = divmod(position, self._num_tasks)
        return Draw(index, epoch)


def pure_order(config: CurriculumConfig, tasks: TaskSource, *, seed: int) -> DrawOrder | None:
    """The order of a sampler whose draws follow from position and seed alone; None for those that adapt."""
    match config.sampler:
        case MixtureSampler():
            return draw_order(tasks, seed=seed)
        case ShuffleSampler():
            return ShuffledOrder(len(tasks), seed=seed)
        case SequentialSampler():
            return SequentialOrder(len(tasks))
    return None


def make_sampler(
    config: CurriculumConfig, tasks: TaskSource, *, seed: int, rates: SuccessRates
) -> TaskSampler:
    """The sampler that a config names.

    Raises:
        ValueError: the source is empty, or a plug-in cannot be loaded or is none.
    """
    chosen = config.sampler
    if isinstance(chosen, Plugin):
        sampler: TaskSampler = make_part(
            METHODS, chosen.target, tasks, options=chosen.options, seed=seed, rates=rates
        )
        return sampler
    if isinstance(chosen, DifficultySampler):
        return BandSampler(chosen, draw_order(tasks, seed=seed), seed=seed, rates=rates)
    order = pure_order(config, tasks, seed=seed)
    assert order is not None, "whatever else there is draws by an order"
    return OrderSampler(order)


class OrderSampler:
    """Draws by an order that nothing changes."""

    def __init__(self, order: DrawOrder) -> None:
        self._order = order

    def draw(self, position: int) -> Draw:
        return self._order[position]

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """Nothing follows from it."""

    def state(self) -> None:
        return None

    def restore(self, state: Any) -> None:
        """There is no state."""


class BandSampler:
    """Draws mostly tasks whose success rate is in a band, each with the same probability; the rest by an order.

    A task of which a draw is still under way is not drawn again from the band.
    """

    def __init__(
        self, config: DifficultySampler, order: DrawOrder, *, seed: int, rates: SuccessRates
    ) -> None:
        self._config = config
        self._order = order
        self._seed = seed
        self._rates = rates
        self._num_explored = 0
        self._under_way: Counter[int] = Counter()
        self._in_band: list[int] = []
        self._find_band()

    def draw(self, position: int) -> Draw:
        rng = np.random.default_rng([self._seed, 0x62616E64, position])
        explores = rng.random() < self._config.explore
        index = None if explores else self._from_band(rng)
        if index is None:
            index = self._order[self._num_explored].task_index
            self._num_explored += 1
        self._under_way[index] += 1
        return Draw(index, self._order[self._num_explored].epoch)

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        del rewards  # the rates know them
        self._under_way[task_index] -= 1
        if self._under_way[task_index] <= 0:
            del self._under_way[task_index]
        rate = self._rates.rate(task_index)
        place = bisect.bisect_left(self._in_band, task_index)
        is_listed = place < len(self._in_band) and self._in_band[place] == task_index
        belongs = rate is not None and self._config.holds(rate)
        if belongs and not is_listed:
            self._in_band.insert(place, task_index)
        elif is_listed and not belongs:
            del self._in_band[place]

    def state(self) -> Mapping[str, Any]:
        return {
            "num_explored": self._num_explored,
            "under_way": {str(index): count for index, count in self._under_way.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._num_explored = int(state["num_explored"])
        self._under_way = Counter({int(index): count for index, count in state["under_way"].items()})
        self._find_band()

    def _find_band(self) -> None:
        rates = {index: self._rates.rate(index) for index in self._rates.known()}
        self._in_band = [
            index for index, rate in rates.items() if rate is not None and self._config.holds(rate)
        ]

    def _from_band(self, rng: np.random.Generator) -> int | None:
        """A task of the band of which no draw is under way; None where there is none, or the band is too small."""
        if len(self._in_band) < self._config.min_tasks:
            return None
        start = int(rng.integers(len(self._in_band)))
        # No more of them than draws that are under way can be taken.
        for offset in range(min(len(self._in_band), len(self._under_way) + 1)):
            index = self._in_band[(start + offset) % len(self._in_band)]
            if index not in self._under_way:
                return index
        return None
