"""Policy losses.

In their formulas r = policy / anchor is the probability ratio of a token, A its advantage. The anchor is `proximal`,
the trainer's policy at the start of the step, or `behavior`, the sampler's as it recorded its logprobs. Against
`behavior` the ratio makes up for all that separates sampler and trainer: a correction on top would count it twice.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from polyturn.configs.plugins import Plugin
from polyturn.configs.section import Section

Anchor = Literal["proximal", "behavior"]


class ClipLoss(Section):
    """PPO's clipped surrogate with clip-higher (arXiv 1707.06347, 2503.14476) and dual clip (1912.09729)."""

    kind: Literal["clip"] = "clip"
    anchor: Anchor = "proximal"
    """What the ratio is against."""
    clip_low: NonNegativeFloat = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.28
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """The loss of a token with negative advantage is at most dual_clip |A|; 3 is usual. Null: no limit."""


class SupervisedLoss(Section):
    """Cross-entropy on all sampled tokens, whatever their reward: with a filter on rewards, rejection sampling."""

    kind: Literal["supervised"]


Loss = Annotated[ClipLoss | SupervisedLoss | Plugin, Field(discriminator="kind")]
