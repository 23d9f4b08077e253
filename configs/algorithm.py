"""What turns rewards into gradients: advantages, losses, penalties and reductions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from polyturn.configs.section import Section


class GroupAdvantage(Section):
    """GRPO: (r - mean of the group) / (std of the group + epsilon) (arXiv 2402.03300)."""

    kind: Literal["grpo"] = "grpo"
    epsilon: PositiveFloat = 1e-6
    """Added to the group's standard deviation."""
    min_spread: NonNegativeFloat = 1e-4
    """A group whose rewards differ by less has advantage 0."""


class CentredAdvantage(Section):
    """Dr.GRPO: r - mean of the group (arXiv 2503.20783)."""

    kind: Literal["dr_grpo"]


Advantage = Annotated[GroupAdvantage | CentredAdvantage, Field(discriminator="kind")]


class ClipLoss(Section):
    """PPO's clipped surrogate with clip-higher (arXiv 1707.06347, 2503.14476)."""

    kind: Literal["clip"] = "clip"
    clip_low: PositiveFloat = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.28
    """The probability ratio is clipped above at 1 + clip_high."""


class NoKL(Section):
    """No KL term."""

    kind: Literal["none"] = "none"


class KLInLoss(Section):
    """A KL penalty to the frozen reference policy, in the loss.

    k2's gradient is the one of KL(policy || reference).
    """

    kind: Literal["in_loss"]
    estimator: Literal["k2"] = "k2"
    """How the divergence is estimated from the sampled tokens."""
    coefficient: PositiveFloat = 1e-3
    """Weight of the penalty in the loss."""


KL = Annotated[NoKL | KLInLoss, Field(discriminator="kind")]


class AlgorithmConfig(Section):
    """What turns rewards into gradients."""

    advantage: Advantage = GroupAdvantage()
    loss: ClipLoss = ClipLoss()
    kl: KL = NoKL()
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """What the loss is a mean of: all trainable tokens, or the means of the sequences."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of an entropy bonus in the loss."""
