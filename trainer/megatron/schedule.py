"""Learning rates by update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

from polyturn.configs.schema.trainer import ConstantSchedule, OptimizerConfig, StableDecaySchedule


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up to the peak over the first updates, then constant or down to a fraction of it."""

    peak: float
    warmup_updates: int = 0
    kind: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    num_updates: int | None = None
    """The update at which the way down ends; the rate stays there. Only constant needs none."""
    final_fraction: float = 0.1
    """Where it ends, as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Of wsd: the part of all updates that the way down takes."""

    def __post_init__(self) -> None:
        assert self.kind == "constant" or self.num_updates is not None, f"a {self.kind} schedule has an end"

    @classmethod
    def from_config(cls, config: OptimizerConfig, *, num_updates: int | None) -> Self:
        """The schedule of a run of `num_updates` updates; None: it has no end.

        Raises:
            ValueError: the schedule needs an end, and neither it nor the run has one.
        """
        peak, warmup = config.learning_rate, config.warmup_updates
        schedule = config.schedule
        if isinstance(schedule, ConstantSchedule):
            return cls(peak=peak, warmup_updates=warmup)
        end = schedule.num_updates or num_updates
        if end is None:
            raise ValueError(
                f"trainer.optimizer.schedule.num_updates must be set: a {schedule.kind} schedule has an end"
            )
        return cls(
            peak=peak,
            warmup_updates=warmup,
            kind=schedule.kind,
            num_updates=end,
            final_fraction=schedule.final_fraction,
            decay_fraction=schedule.decay_fraction if isinstance(schedule, StableDecaySchedule) else 0.2,
        )

    def __call__(self, update: int) -> float:
        """The rate of update number `update`, counted from 0."""
        if update < self.warmup_updates:
            return self.peak * (update + 1) / self.warmup_updates
        if self.num_updates is None:
            return self.peak
        start = self.warmup_updates
        if self.kind == "wsd":
            start = max(start, self.num_updates - round(self.decay_fraction * self.num_updates))
        progress = min(max(update - start, 0) / max(self.num_updates - start, 1), 1.0)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * left)
