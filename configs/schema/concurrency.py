"""How many episodes are live at once: their KV is in the engines, and is worth keeping there."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from polyturn.configs.schema.section import Section


class FixedConcurrency(Section):
    """All of `max_concurrent_episodes`, whatever the engines say."""

    kind: Literal["fixed"] = "fixed"


class AdaptiveConcurrency(Section):
    """As many as the engines hold, by what they say of themselves each second: more by a step while episodes wait and
    there is room, fewer by a share where requests lose their place for want of KV, queue, or compute again what was
    computed. Episodes beyond the limit wait before their next request."""

    kind: Literal["adaptive"]
    min_episodes: PositiveInt = 8
    """Never fewer; never more than `rollout.max_concurrent_episodes`."""
    start_episodes: PositiveInt | None = None
    """At the start of a run; null: as many as may be."""
    low_kv_use: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the fullest engine's KV up to which the number grows."""
    high_kv_use: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the fullest engine's KV from which it falls."""
    increase: Annotated[float, Field(gt=0, le=1)] = 0.02
    """A step, as a share of `rollout.max_concurrent_episodes`; one episode at least."""
    decrease: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """What is left of the number after a fall."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        if self.low_kv_use > self.high_kv_use:
            raise ValueError(
                f"low_kv_use ({self.low_kv_use:g}) must not be above high_kv_use ({self.high_kv_use:g})"
            )
        return self


Concurrency = Annotated[FixedConcurrency | AdaptiveConcurrency, Field(discriminator="kind")]
