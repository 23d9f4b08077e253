"""Which tasks a run draws: by a sampler, past a gate, and by what is known of how difficult each is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt, model_validator

from polyturn.configs.schema.section import Plugin, Section

Share = Annotated[float, Field(ge=0, le=1)]


class Band(Section):
    """A range of success rates."""

    low: Share
    """The lowest rate that is in it."""
    high: Share
    """The highest rate that is in it."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}: no success rate is between them")
        return self

    def holds(self, rate: float) -> bool:
        """Whether a success rate is in the band."""
        return self.low <= rate <= self.high


class MixtureSampler(Section):
    """Every source shuffled anew in each epoch of its own; several in proportion to their weights."""

    kind: Literal["mixture"] = "mixture"


class ShuffleSampler(Section):
    """All tasks shuffled anew in each epoch, whatever the weights of their sources."""

    kind: Literal["shuffle"]


class SequentialSampler(Section):
    """All tasks in their order, epoch after epoch."""

    kind: Literal["sequential"]


class DifficultySampler(Band):
    """Mostly tasks whose success rate is in a band: there a group's episodes differ, and something is learnt.

    The rest of the draws, and all while few tasks are known to be in the band, go through the tasks as `mixture` does,
    so that every task's rate is found out, and found out again as the policy changes.
    """

    kind: Literal["difficulty"]
    low: Share = 0.2
    """The lowest success rate of the band."""
    high: Share = 0.8
    """The highest success rate of the band."""
    explore: Share = 0.25
    """Share of the draws that go through all tasks."""
    min_tasks: PositiveInt = 32
    """All draws go through all tasks while fewer than so many are known to be in the band."""


class OpenGate(Section):
    """Every draw is played."""

    kind: Literal["open"] = "open"


class BandGate(Band):
    """A draw of a task whose success rate is outside a band is passed over, and the next one is looked at."""

    kind: Literal["band"]
    low: Share = 0.05
    """The lowest success rate that is played."""
    high: Share = 0.95
    """The highest success rate that is played."""
    min_episodes: PositiveInt = 8
    """A task is played whatever its rate until so many episodes are known of it."""
    retry_after: NonNegativeInt = 4
    """A task that was passed over so many times is played once more; 0: never again."""


class CurriculumConfig(Section):
    """Which tasks are drawn, and when (docs/tasks.md). What adapts is part of every checkpoint."""

    sampler: Annotated[
        MixtureSampler | ShuffleSampler | SequentialSampler | DifficultySampler | Plugin,
        Field(discriminator="kind"),
    ] = MixtureSampler()
    gate: Annotated[OpenGate | BandGate | Plugin, Field(discriminator="kind")] = OpenGate()
    difficulties: Path | None = None
    """A file that `polyturn probe` wrote: the success rates that a run begins with."""
    success_reward: FiniteFloat = 1.0
    """An episode whose reward, without group rewards, reaches this is a success."""
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """What earlier episodes of a task weigh in its rate after each new group of it; 0: only the newest group counts."""

    @model_validator(mode="after")
    def _difficulties_are_used(self) -> Self:
        fixed = isinstance(self.sampler, MixtureSampler | ShuffleSampler | SequentialSampler)
        if self.difficulties is not None and fixed and isinstance(self.gate, OpenGate):
            raise ValueError(
                "difficulties are read by a sampler of kind difficulty or plugin, or by a gate of kind band or plugin; "
                "without one they change nothing"
            )
        return self
