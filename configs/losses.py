"""Policy losses.

In their formulas r = policy / anchor is the probability ratio of a token, A its advantage. The anchor is `proximal`,
the trainer's policy at the start of the step, or `behavior`, the sampler's as it recorded its logprobs. Against
`behavior` the ratio makes up for all that separates sampler and trainer: a correction on top would count it twice.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

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


class GSPOLoss(Section):
    """GSPO: one ratio for all tokens of a context, the geometric mean of theirs, clipped as a whole (arXiv 2507.18071).

    Made for `reduction: {kind: sequence_mean}`. What is clipped together is one context: an episode whose context was
    rewritten on the way has several.
    """

    kind: Literal["gspo"]
    form: Literal["sequence", "token"] = "sequence"
    """sequence: the gradient of the mean ratio. token: each token has its own gradient and advantage, times the same
    ratio; with one advantage for all tokens the two are equal."""
    anchor: Anchor = "proximal"
    """What the ratio is against."""
    clip_low: NonNegativeFloat = 3e-4
    """The context's ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 4e-4
    """The context's ratio is clipped above at 1 + clip_high."""


class LUSPOLoss(Section):
    """LUSPO: GSPO's loss times the number of tokens of the context, which undoes its length bias (arXiv 2602.05261)."""

    kind: Literal["luspo"]
    anchor: Anchor = "proximal"
    """What the ratio is against."""
    clip_low: NonNegativeFloat = 3e-4
    """The context's ratio is clipped below at 1 - clip_low."""
    clip_high: NonNegativeFloat = 4e-4
    """The context's ratio is clipped above at 1 + clip_high."""


class GMPOLoss(Section):
    """GMPO: the geometric mean of a context's ratios, each clipped first (arXiv 2507.20673)."""

    kind: Literal["gmpo"]
    anchor: Anchor = "proximal"
    """What the ratio is against."""
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
    anchor: Anchor = "proximal"
    """What the ratio is against."""
    ratio_cap: PositiveFloat = 5.0
    """The largest weight of a token: the ratio itself, not its distance from 1 (5 in arXiv 2510.13786)."""
    ratio_floor: NonNegativeFloat = 0.0
    """The smallest weight of a token; 0 is none."""


class SAPOLoss(Section):
    """SAPO: a sigmoid of the ratio in place of the clip, steeper where the advantage is negative (arXiv 2511.20347)."""

    kind: Literal["sapo"]
    anchor: Anchor = "proximal"
    """What the ratio is against."""
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
