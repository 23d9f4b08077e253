"""Sections of the objective: policy losses, KL penalties, off-policy corrections, and how losses become one number.

r = policy / anchor is the probability ratio of a token, A its advantage. The anchor is `proximal`, the trainer's policy
at the start of the step, or `behavior`, the sampler's as recorded. Against `behavior` the ratio makes up
for all that separates sampler and trainer: a correction on top would count it twice, only rejection adds to it.

With d = log policy - log anchor of a sampled token, the estimators of KL(policy || anchor) are k1 = d, k2 = d^2 / 2 and
k3 = exp(-d) - 1 + d (Schulman 2020). That an estimator has the right value says nothing of its gradient.

rho = proximal / behavior differs from 1 by the mismatch of two implementations, and by staleness where weights have
changed since. A correction makes weights of it once a step: the policy loss of each token is multiplied by them, 0
rejects it. Rejected tokens stay in the denominators. Beside a loss against `proximal` this is decoupled PPO (arXiv
2110.00641), of three policies.

Denominators are those of the whole optimizer update, whatever its micro-batches and ranks. A sequence is an episode, or
what one role wrote in it, over all its contexts. B is the number of sequences that have a trainable token.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from polyturn.configs.schema.section import Plugin, Section

Anchor = Literal["proximal", "behavior"]


class ClipLoss(Section):
    """PPO's clipped surrogate with clip-higher (arXiv 1707.06347, 2503.14476) and dual clip (1912.09729)."""

    kind: Literal["clip"] = "clip"
    anchor: Anchor | None = None
    """What the ratio is against; null: `behavior` where rollout.max_staleness allows old tokens, else `proximal`."""
    clip_low: NonNegativeFloat = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.28
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """The loss of a token with negative advantage is at most dual_clip |A|; 3 is usual. Null: no limit."""


class GSPOLoss(Section):
    """GSPO: one ratio for all tokens of a context, the geometric mean of theirs, clipped as a whole (arXiv 2507.18071).

    Made for `reduction: {kind: sequence_mean}`. What is clipped together is one context: an episode whose context was
    rewritten on the way has several.
    """

    kind: Literal["gspo"]
    form: Literal["sequence", "token"] = "sequence"
    """sequence: the gradient of the mean ratio. token: each token has its own gradient and advantage, times the same
    ratio; with one advantage for all tokens the two are equal."""
    anchor: Anchor | None = None
    """What the ratio is against; null: `behavior` where rollout.max_staleness allows old tokens, else `proximal`."""
    clip_low: NonNegativeFloat = 3e-4
    """The context's ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 4e-4
    """The context's ratio is clipped above at 1 + clip_high."""


class LUSPOLoss(Section):
    """LUSPO: GSPO's loss times the number of tokens of the context, which undoes its length bias (arXiv 2602.05261)."""

    kind: Literal["luspo"]
    anchor: Anchor | None = None
    """What the ratio is against; null: `behavior` where rollout.max_staleness allows old tokens, else `proximal`."""
    clip_low: NonNegativeFloat = 3e-4
    """The context's ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 4e-4
    """The context's ratio is clipped above at 1 + clip_high."""


class GMPOLoss(Section):
    """GMPO: the geometric mean of a context's ratios, each clipped first (arXiv 2507.20673)."""

    kind: Literal["gmpo"]
    anchor: Anchor | None = None
    """What the ratio is against; null: `behavior` where rollout.max_staleness allows old tokens, else `proximal`."""
    clip_low: NonNegativeFloat = 0.4
    """Where the advantage is negative, a token's log-ratio is at least -clip_low."""
    clip_high: NonNegativeFloat = 0.4
    """Where it is positive, a token's log-ratio is at most clip_high."""


class VESPOLoss(Section):
    """VESPO: REINFORCE with the weight w^k exp(rate (1 - w)), w the ratio of the whole context (arXiv 2602.10693)."""

    kind: Literal["vespo"]
    anchor: Anchor = "behavior"
    """What the ratio is against."""
    power_positive: NonNegativeFloat = 2.0
    """k where the advantage is not negative."""
    rate_positive: NonNegativeFloat = 3.0
    """The rate where the advantage is not negative."""
    power_negative: NonNegativeFloat = 3.0
    """k where the advantage is negative."""
    rate_negative: NonNegativeFloat = 2.0
    """The rate where the advantage is negative."""


class CISPOLoss(Section):
    """CISPO: REINFORCE weighted by the detached, capped ratio: no token loses its gradient (arXiv 2506.13585)."""

    kind: Literal["cispo"]
    anchor: Anchor | None = None
    """What the ratio is against; null: `behavior` where rollout.max_staleness allows old tokens, else `proximal`."""
    ratio_cap: PositiveFloat = 5.0
    """The largest weight of a token: the ratio itself, not its distance from 1 (5 in arXiv 2510.13786)."""
    ratio_floor: NonNegativeFloat = 0.0
    """The smallest weight of a token; 0 is none."""


class SAPOLoss(Section):
    """SAPO: a sigmoid of the ratio in place of the clip, steeper where the advantage is negative (arXiv 2511.20347)."""

    kind: Literal["sapo"]
    anchor: Anchor | None = None
    """What the ratio is against; null: `behavior` where rollout.max_staleness allows old tokens, else `proximal`."""
    temperature_positive: PositiveFloat = 1.0
    """The steepness where the advantage is positive."""
    temperature_negative: PositiveFloat = 1.05
    """The steepness where it is not."""


class DPPOLoss(Section):
    """DPPO: leave out tokens whose probability, not ratio, moved too far with the advantage (arXiv 2602.04879)."""

    kind: Literal["dppo"]
    anchor: Anchor = "behavior"
    """What the probability has moved from."""
    divergence: Literal["total_variation", "kl"] = "total_variation"
    """How far: by the difference of the probabilities, or by KL(anchor || policy) of "this token or another"."""
    threshold_low: PositiveFloat = 0.2
    """The farthest down, where the advantage is negative."""
    threshold_high: PositiveFloat = 0.2
    """The farthest up, where the advantage is positive."""
    drift_penalty: NonNegativeFloat = 1e-3
    """Coefficient of (log policy - log anchor)^2, which holds all tokens, those left out too."""


class TOPRLoss(Section):
    """TOPR: no ratio where the advantage is positive, one of at most ratio_cap elsewhere (arXiv 2503.14286)."""

    kind: Literal["topr"]
    anchor: Anchor = "behavior"
    """What the ratio is against."""
    ratio_cap: PositiveFloat = 1.0
    """The largest weight of a token with negative advantage."""


class ReinforceLoss(Section):
    """REINFORCE weighted by the detached ratio: unbiased for any sampler, of unbounded variance (Williams 1992)."""

    kind: Literal["reinforce"]
    anchor: Anchor = "behavior"
    """What the ratio is against."""


class PolicyGradientLoss(Section):
    """REINFORCE without a ratio, as if every token had been sampled just now (Williams 1992)."""

    kind: Literal["policy_gradient"]


class SupervisedLoss(Section):
    """Cross-entropy on all sampled tokens, whatever their reward: with a filter on rewards, rejection sampling."""

    kind: Literal["supervised"]


Loss = Annotated[
    ClipLoss
    | GSPOLoss
    | LUSPOLoss
    | GMPOLoss
    | VESPOLoss
    | CISPOLoss
    | SAPOLoss
    | DPPOLoss
    | TOPRLoss
    | ReinforceLoss
    | PolicyGradientLoss
    | SupervisedLoss
    | Plugin,
    Field(discriminator="kind"),
]


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


class NoEntropyControl(Section):
    """Nothing is done about tokens that take entropy."""

    kind: Literal["none"] = "none"


class ClipCov(Section):
    """Clip-Cov: a few tokens, drawn among those of high covariance, have no policy loss (arXiv 2505.22617)."""

    kind: Literal["clip_cov"]
    fraction: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Of the step's trainable tokens, how many are drawn; at least one, where any qualifies."""
    low: float = 1.0
    """The least covariance of a token that may be drawn."""
    high: float = 5.0
    """The largest covariance of a token that may be drawn."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class KLCov(Section):
    """KL-Cov: the tokens of the highest covariance are held near the step's start by a KL (arXiv 2505.22617)."""

    kind: Literal["kl_cov"]
    fraction: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    """Of the step's trainable tokens, how many are held; at least one."""
    coefficient: PositiveFloat = 1.0
    """Weight of their penalty in the loss."""


EntropyControl = Annotated[NoEntropyControl | ClipCov | KLCov | Plugin, Field(discriminator="kind")]


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
    anchor: Literal["reference", "proximal", "behavior", "teacher"] = "reference"
    """The policy that ours is kept near: the frozen reference, the trainer's at the start of the step, the sampler's,
    or the teacher (docs/distillation.md)."""
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


class TokenMean(Section):
    """The mean over all trainable tokens: long sequences weigh more (DAPO, arXiv 2503.14476)."""

    kind: Literal["token_mean"] = "token_mean"


class SequenceMean(Section):
    """The mean over sequences of the mean over their tokens: every sequence weighs the same (arXiv 2402.03300)."""

    kind: Literal["sequence_mean"]


class SequenceSum(Section):
    """The mean over sequences of the sum over their tokens."""

    kind: Literal["sequence_sum"]


class SequenceSumNorm(Section):
    """The mean over sequences of the sum over their tokens divided by a constant (Dr.GRPO, arXiv 2503.20783)."""

    kind: Literal["sequence_sum_norm"]
    length: PositiveInt
    """The constant: as a rule the largest number of tokens that an episode can sample."""


class PromptMean(Section):
    """The mean over prompts of the mean over all tokens sampled for the prompt: every prompt weighs the same."""

    kind: Literal["prompt_mean"]


class TokenSum(Section):
    """The sum over all trainable tokens: the gradient grows with the batch."""

    kind: Literal["token_sum"]


Reduction = Annotated[
    TokenMean | SequenceMean | SequenceSum | SequenceSumNorm | PromptMean | TokenSum | Plugin,
    Field(discriminator="kind"),
]
