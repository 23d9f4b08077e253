"""Corrections for what separates the sampler from the trainer.

rho = proximal / behavior is the ratio of a token: the trainer's policy at the start of the step over the sampler's. It
differs from 1 by the mismatch of two implementations, and by staleness where weights have changed since. A correction
makes weights of it once a step: the policy loss of each token is multiplied by them, 0 rejects it. Rejected tokens stay
in the denominators of the loss. A sequence is an episode, or what one role wrote in it, over all its contexts.

With a loss whose ratio is against `proximal` this is decoupled PPO (arXiv 2110.00641), of three policies. A loss whose
ratio is against `behavior` makes up for rho itself; only rejection adds to it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from polyturn.configs.plugins import Plugin
from polyturn.configs.section import Section


class CorrectionSection(Section):
    """What all corrections have in common."""

    weighs: ClassVar[bool] = False
    """Whether its weights are importance weights, rather than only 0 and 1."""


class TwoSided(CorrectionSection):
    """What has a range of ratios."""

    low: NonNegativeFloat
    high: PositiveFloat

    @model_validator(mode="after")
    def _holds_one(self) -> Self:
        if not self.low <= 1 <= self.high:
            raise ValueError(
                f"low {self.low:g} and high {self.high:g} must have 1 between them, the ratio of a sampler that agrees "
                "with the trainer"
            )
        return self


class TruncatedImportance(CorrectionSection):
    """Truncated importance sampling: min(rho, cap) (arXiv 1802.01561).

    The weights of tokens have little variance, and are blind to how the sampler got to a token's context; those of
    sequences are exact up to the cap, and their variance grows with length; geometric means are between the two.
    """

    weighs: ClassVar[bool] = True
    kind: Literal["truncated_importance"]
    level: Literal["token", "sequence", "geometric"] = "token"
    """rho of each token, their product over the sequence, or their geometric mean."""
    cap: PositiveFloat = 2.0
    """The largest weight."""
    normalize: bool = False
    """Divide by the mean weight of the step's trainable tokens, or of its sequences where the level is not `token`, so
    that the size of the loss stays."""


class IcePop(TwoSided):
    """IcePop: rho where it is between low and high, and rejection of the token elsewhere (arXiv 2510.18855)."""

    weighs: ClassVar[bool] = True
    kind: Literal["icepop"]
    low: NonNegativeFloat = 0.5
    """The smallest rho that is kept."""
    high: PositiveFloat = 5.0
    """The largest rho that is kept."""


class GeometricRejection(TwoSided):
    """Keep a sequence where the geometric mean of its tokens' rho is between low and high."""

    kind: Literal["geometric_rejection"]
    low: NonNegativeFloat = 0.99
    """The smallest mean that is kept."""
    high: PositiveFloat = 1.01
    """The largest mean that is kept."""


class DivergenceRejection(CorrectionSection):
    """Keep a sequence where an estimate of its KL(behavior || proximal) is at most the threshold."""

    kind: Literal["divergence_rejection"]
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """With d = log behavior - log proximal of a token: d, d^2 / 2, or exp(-d) - 1 + d."""
    over_tokens: Literal["sum", "mean", "max"] = "mean"
    """How the estimates of the sequence's tokens are put together."""
    threshold: PositiveFloat
    """The largest estimate that is kept."""


class Veto(TwoSided):
    """Reject a whole sequence when rho of any of its tokens is below low or above high."""

    kind: Literal["veto"]
    low: NonNegativeFloat = 1e-4
    """The smallest rho that is no outlier."""
    high: PositiveFloat = 100.0
    """The largest rho that is no outlier."""


class OffPolicySequenceMask(CorrectionSection):
    """Reject tokens of negative advantage in sequences that have become unlikely (OPSM, arXiv 2512.02556)."""

    kind: Literal["off_policy_sequence_mask"]
    threshold: PositiveFloat
    """The largest mean of log behavior - log proximal over a sequence's tokens that is kept."""


Correction = Annotated[
    TruncatedImportance
    | IcePop
    | GeometricRejection
    | DivergenceRejection
    | Veto
    | OffPolicySequenceMask
    | Plugin,
    Field(discriminator="kind"),
]
