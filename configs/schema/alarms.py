"""Thresholds beyond which a run says that something is amiss, with what to do about it. It goes on all the same."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from polyturn.configs.schema.section import Section

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=1)]


class AlarmsConfig(Section):
    """What a run warns of, in the terminal and in the metrics (docs/training.md); null turns an alarm off."""

    after_steps: PositiveInt = 2
    """An alarm goes off when its figure was beyond its threshold in so many steps in a row; a stall at once."""
    stall_s: PositiveFloat | None = 300.0
    """Seconds in which no episode ended, while some are under way."""
    failed_attempts: Share | None = 0.2
    """Share of a step's attempts that failed, to be played again or dropped."""
    uniform_groups: Share | None = 0.8
    """Share of a step's groups whose rewards do not differ: a comparison within a group makes nothing of them."""
    truncated_episodes: Share | None = 0.5
    """Share of a step's episodes that a limit ended."""
    kv_use: Share | None = 0.95
    """Share of an engine's KV cache that was in use, the largest of all engines."""
    rank_imbalance: Ratio | None = 1.5
    """Tokens of the trainer's busiest data-parallel rank over those of the mean one."""
    lost_tokens: NonNegativeInt | None = 0
    """Tokens that engines sampled for a step's episodes and that stand in no segment to be trained on."""
    engines_missing: NonNegativeInt | None = 0
    """Engines that should serve and do not: lost and not replaced yet, or given up."""
    engine_slowness: Ratio | None = 3.0
    """Seconds that a request takes for a token at the slowest engine, over those at the median one."""
    engine_imbalance: Ratio | None = 2.0
    """Requests under way at the busiest engine over those of the mean one, on average over a step."""
