"""KL penalties: which estimator, where it enters, and which combinations have the gradient of a KL.

With d = log policy - log anchor of a sampled token, the estimators of KL(policy || anchor) are k1 = d, k2 = d^2 / 2 and
k3 = exp(-d) - 1 + d (Schulman 2020). That an estimator has the right value says nothing of its gradient.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from polyturn.configs.section import Section

Estimator = Literal["k1", "k2", "k3"]


class NoKL(Section):
    """No KL term."""

    kind: Literal["none"] = "none"


class KLInLoss(Section):
    """A KL penalty to a fixed policy, as a term of the loss.

    Right are k2, with a detached ratio where tokens are stale, and k1 or k3 times the differentiated ratio (as in
    DeepSeek-V3.2, arXiv 2512.02556): all three have the gradient of KL(policy || anchor).
    """

    kind: Literal["in_loss"]
    estimator: Estimator = "k2"
    """How the divergence is estimated from the sampled tokens."""
    ratio: Literal["none", "detached", "differentiated"] = "none"
    """Each token's estimate is multiplied by policy / behavior: not at all, without its gradient, or with it."""
    anchor: Literal["reference", "proximal", "behavior"] = "reference"
    """The policy that ours is kept near: the frozen reference, the trainer's at the start of the step, or the
    sampler's."""
    coefficient: PositiveFloat = 1e-3
    """Weight of the penalty in the loss."""

    @model_validator(mode="after")
    def _has_the_gradient_of_a_kl(self) -> Self:
        fault = _IN_LOSS_FAULTS.get((self.estimator, self.ratio))
        if fault is not None:
            raise ValueError(fault)
        return self


_RIGHT_IN_LOSS = "take estimator k2, or k1 or k3 with ratio: differentiated"
_IN_LOSS_FAULTS = {
    ("k1", "none"): "k1 as a term of the loss has an expected gradient of zero, so it regularises nothing; "
    + _RIGHT_IN_LOSS,
    (
        "k1",
        "detached",
    ): "k1 in the loss has an expected gradient of zero with a detached ratio too, so it regularises "
    "nothing; " + _RIGHT_IN_LOSS,
    (
        "k3",
        "none",
    ): "k3 as a term of the loss has the gradient of KL(reference || policy), the other direction; "
    + _RIGHT_IN_LOSS,
    (
        "k3",
        "detached",
    ): "k3 in the loss has the gradient of KL(reference || policy), the other direction, with a "
    "detached ratio too; " + _RIGHT_IN_LOSS,
    (
        "k2",
        "differentiated",
    ): "k2 times the differentiated ratio is not a KL's gradient: it has that of the mean of "
    "d^2 / 2; take ratio: detached with k2, or k1 or k3 with ratio: differentiated",
}


class KLInReward(Section):
    """A KL penalty to the frozen reference policy, taken off the reward token by token, without gradient (RLHF).

    Only k1 makes this the gradient of KL(policy || reference), and only with an advantage that sums the rewards of the
    tokens to come: the penalties are part of the return.
    """

    kind: Literal["in_reward"]
    estimator: Estimator = "k1"
    """How the divergence is estimated from the sampled tokens; k1 is the only right one here."""
    coefficient: PositiveFloat = 1e-3
    """Weight of the penalty in the reward."""

    @model_validator(mode="after")
    def _has_the_gradient_of_a_kl(self) -> Self:
        fault = {
            "k2": "k2 in the reward has a biased gradient, that of the mean of d^2 / 2 less its own; take k1",
            "k3": "k3 in the reward has the gradient of KL(policy || reference) - KL(reference || policy); take k1",
        }.get(self.estimator)
        if fault is not None:
            raise ValueError(fault)
        return self


KL = Annotated[NoKL | KLInLoss | KLInReward, Field(discriminator="kind")]
