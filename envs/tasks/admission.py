"""Whether a task that was drawn is played, or passed over for the next one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Protocol

from polyturn.configs.schema.curriculum import BandGate, CurriculumConfig, OpenGate
from polyturn.envs.messages import TaskSource
from polyturn.envs.plugins import Signature, make_part
from polyturn.envs.tasks.rates import SuccessRates


class AdmissionGate(Protocol):
    """Says of each draw whether it is played.

    A class that is a plug-in is made as `Gate(tasks, rates=..., **options)`, as a task sampler without a seed.
    """

    def admits(self, task_index: int) -> bool:
        """Whether a task that was drawn is played this time. Called once for each draw, in their order."""
        ...

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """As of a task sampler: what came of a draw that was admitted."""
        ...

    def state(self) -> Any:
        """All that answers follow from beside `rates`, as JSON has it."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave."""
        ...


METHODS = {
    "admits": Signature(
        what="gate's `admits`",
        arguments=("task_index",),
        text="def admits(self, task_index: int) -> bool",
        wrong_results=(str, bytes, float, NoneType),
    ),
    "observe": Signature(
        what="gate's `observe`",
        arguments=("task_index", "rewards"),
        text="def observe(self, task_index: int, rewards: Sequence[float]) -> None",
        wrong_results=(),
    ),
    "state": Signature(
        what="gate's `state`",
        arguments=(),
        text="def state(self) -> Any",
        wrong_results=(),
    ),
    "restore": Signature(
        what="gate's `restore`",
        arguments=("state",),
        text="def restore(self, state: Any) -> None",
        wrong_results=(),
    ),
}


def make_gate(config: CurriculumConfig, tasks: TaskSource, *, rates: SuccessRates) -> AdmissionGate | None:
    """The gate that a config names; None where every draw is played.

    Raises:
        ValueError: a plug-in cannot be loaded or is none.
    """
    if isinstance(config.gate, OpenGate):
        return None
    if isinstance(config.gate, BandGate):
        return RateGate(config.gate, rates=rates)
    target, options = config.gate.target, config.gate.options
    gate: AdmissionGate = make_part(METHODS, target, tasks, options=options, rates=rates)
    return gate


class RateGate:
    """Passes over tasks whose success rate is outside a band, but for now and then."""

    def __init__(self, config: BandGate, *, rates: SuccessRates) -> None:
        self._config = config
        self._rates = rates
        self._passed_over: Counter[int] = Counter()

    def admits(self, task_index: int) -> bool:
        rate = self._rates.rate(task_index)
        known = self._rates.num_episodes(task_index) >= self._config.min_episodes
        if rate is None or not known or self._config.holds(rate):
            return True
        if self._config.retry_after and self._passed_over[task_index] >= self._config.retry_after:
            del self._passed_over[task_index]
            return True
        self._passed_over[task_index] += 1
        return False

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """The rates say it all."""

    def state(self) -> Mapping[str, int]:
        return {str(index): count for index, count in self._passed_over.items()}

    def restore(self, state: Mapping[str, int]) -> None:
        self._passed_over = Counter({int(index): count for index, count in state.items()})
