"""Learning rates by update."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRateSchedule:
    """Linear warm-up to the peak over the first updates, then constant or, with `num_updates`, half a cosine."""

    peak: float
    warmup_updates: int = 0
    num_updates: int | None = None
    """The update at which the cosine ends; None keeps the peak."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a fraction of the peak."""

    def __call__(self, update: int) -> float:
        """The rate of update number `update`, counted from 0."""
        if update < self.warmup_updates:
            return self.peak * (update + 1) / self.warmup_updates
        if self.num_updates is None:
            return self.peak
        length = max(self.num_updates - self.warmup_updates, 1)
        progress = min((update - self.warmup_updates) / length, 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.peak * (self.final_fraction + (1 - self.final_fraction) * cosine)
