"""What turns rewards into gradients: advantages, losses, penalties and reductions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from polyturn.configs.kl import KL, KLInLoss, KLInReward, NoKL
from polyturn.configs.losses import ClipLoss, Loss
from polyturn.configs.reductions import Reduction, TokenMean
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


class AlgorithmConfig(Section):
    """What turns rewards into gradients."""

    advantage: Advantage = GroupAdvantage()
    loss: Loss = ClipLoss()
    kl: KL = NoKL()
    reduction: Reduction = TokenMean()
    """How the losses of tokens become one number."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of an entropy bonus in the loss."""

    @property
    def needs_reference(self) -> bool:
        """Whether the logprobs of a frozen reference policy are needed."""
        return isinstance(self.kl, KLInReward) or (
            isinstance(self.kl, KLInLoss) and self.kl.anchor == "reference"
        )
