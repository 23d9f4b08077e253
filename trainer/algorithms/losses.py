"""Policy losses and the critic's, token by token; a reduction weighs and sums them.

Losses with one ratio for all trainable tokens of a sample give every token of a sample the sample's loss as its value,
so that a mean over the tokens of a sample is its loss; a sum over them is the number of its tokens times that.
"""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import (
    Anchor,
    CISPOLoss,
    ClipLoss,
    DPPOLoss,
    GMPOLoss,
    GSPOLoss,
    LUSPOLoss,
    PolicyGradientLoss,
    ReinforceLoss,
    SAPOLoss,
    SupervisedLoss,
    TOPRLoss,
    VESPOLoss,
)
from polyturn.trainer.algorithms.registry import POLICY_LOSSES
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss, bounded_exp, is_beyond_bound, log_ratio


def log_ratios(batch: TokenBatch, anchor: Anchor | None) -> torch.Tensor:
    """log(policy / anchor) of each token, [N], with the policy's gradient; 0 where the mask is False.

    None is `proximal`.
    """
    anchors = {"proximal": batch.proximal_logprobs, "behavior": batch.behavior_logprobs}
    return log_ratio(batch.logprobs, anchors[anchor or "proximal"].detach(), batch.mask)


def token_ratios(batch: TokenBatch, anchor: Anchor | None) -> torch.Tensor:
    """policy / anchor of each token, [N], with the policy's gradient; 1 where the mask is False."""
    return bounded_exp(log_ratios(batch, anchor))


def masked_advantages(batch: TokenBatch) -> torch.Tensor:
    """The advantages [N], 0 where the mask is False."""
    return torch.where(batch.mask, batch.advantages, 0.0)


def masked_logprobs(batch: TokenBatch) -> torch.Tensor:
    """The policy's logprobs [N] with their gradient, 0 where the mask is False."""
    return torch.where(batch.mask, batch.logprobs, 0.0)


@POLICY_LOSSES.register(
    "clip",
    config=ClipLoss,
    paper="1707.06347, 2503.14476, 1912.09729",
    formula="-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); where A < 0 at most dual_clip |A|",
    gradients={"loss": "on_policy_gradient"},
)
def clip_loss(batch: TokenBatch, config: ClipLoss) -> TokenLoss:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = policy / anchor.

    PPO (arXiv 1707.06347, eq. 7); a higher upper bound of its own is DAPO's clip-higher (arXiv 2503.14476, eq. 10).
    With `dual_clip` c > 1 the loss of a token with A < 0 is at most c |A| (arXiv 1912.09729, eq. 5): without it a token
    that became much likelier since it was sampled has a gradient without bound.
    """
    loss = clipped_surrogate(
        log_ratios(batch, config.anchor), batch, clip_low=config.clip_low, clip_high=config.clip_high
    )
    if config.dual_clip is None:
        return loss
    advantages = masked_advantages(batch)
    ceiling = config.dual_clip * advantages.abs()
    beyond = (advantages < 0) & (loss.values > ceiling)
    return TokenLoss(values=torch.where(beyond, ceiling, loss.values), clipped=loss.clipped | beyond.detach())


def clipped_surrogate(
    logs: torch.Tensor,
    batch: TokenBatch,
    *,
    clip_low: float,
    clip_high: float,
    ratios: torch.Tensor | None = None,
) -> TokenLoss:
    """PPO's surrogate of the given log-ratios [N], which may be those of tokens or of what they are part of.

    Where a log-ratio is so large that its ratio is cut, the token has no gradient whatever its advantage, and counts as
    clipped.

    Args:
        ratios: the ratios [N], where their gradient is another than that of exp(logs).
    """
    beyond = is_beyond_bound(logs, batch.mask) if ratios is None else torch.zeros_like(batch.mask)
    ratios = bounded_exp(logs) if ratios is None else ratios
    advantages = masked_advantages(batch)
    free = -ratios * advantages
    bounded = -ratios.clamp(1 - clip_low, 1 + clip_high) * advantages
    clipped = (bounded > free).detach() & batch.mask
    return TokenLoss(values=torch.maximum(free, bounded), clipped=clipped | beyond)


@POLICY_LOSSES.register(
    "sapo",
    config=SAPOLoss,
    paper="2511.20347",
    formula="-(4 / T) sigmoid(T (r - 1)) A, T by the sign of A",
    gradients={"loss": "on_policy_gradient"},
)
def sapo_loss(batch: TokenBatch, config: SAPOLoss) -> TokenLoss:
    """-(4 / T) sigmoid(T (r - 1)) A with T by the sign of A (arXiv 2511.20347, eqs. 5 and 6). Nothing is clipped.

    The factor makes the gradient at r = 1 that of the surrogate without a bound.
    """
    advantages = masked_advantages(batch)
    ratios = token_ratios(batch, config.anchor)
    temperature = torch.full_like(ratios, config.temperature_negative).masked_fill(
        advantages > 0, config.temperature_positive
    )
    gate = 4 / temperature * torch.sigmoid(temperature * (ratios - 1))
    return TokenLoss(values=-gate * advantages, clipped=torch.zeros_like(batch.mask))


@POLICY_LOSSES.register(
    "dppo",
    config=DPPOLoss,
    paper="2602.04879",
    formula="-1[D inside] r A + drift_penalty (log r)^2, D = p - p_anchor or the KL of two-way distributions",
    gradients={"loss": "on_policy_gradient"},
)
def dppo_loss(batch: TokenBatch, config: DPPOLoss) -> TokenLoss:
    """-r A of the tokens whose probability has not yet moved too far the way that A pushes it, and a pull back.

    DPPO (arXiv 2602.04879), with its binary approximations: total variation |p - p_anchor|, or
    KL(anchor || policy) of the two-way distribution (p, 1 - p). A ratio says little of how far a policy has moved: a
    token from 1e-6 to 1e-5 has one of 10, one from 0.5 to 0.9 has 1.8. The pull (log r)^2 is prime-rl's.
    """
    logs = log_ratios(batch, config.anchor)
    advantages = masked_advantages(batch)
    now = torch.where(batch.mask, batch.logprobs, 0.0).detach().exp()
    before = (torch.where(batch.mask, batch.logprobs, 0.0) - logs).detach().exp()
    if config.divergence == "total_variation":
        distance = (now - before).abs()
    else:
        distance = _two_way_kl(before, now)
    too_high = (advantages > 0) & (now > before) & (distance > config.threshold_high)
    too_low = (advantages < 0) & (now < before) & (distance > config.threshold_low)
    outside = (too_high | too_low) & batch.mask
    values = torch.where(outside, 0.0, -bounded_exp(logs) * advantages) + config.drift_penalty * logs.square()
    return TokenLoss(values=values, clipped=outside | is_beyond_bound(logs, batch.mask))


def _two_way_kl(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """KL((q, 1 - q) || (p, 1 - p)) of probabilities q and p, kept off 0 and 1 by the smallest step of their type."""
    tiny = torch.finfo(now.dtype).eps
    q, p = before.clamp(tiny, 1 - tiny), now.clamp(tiny, 1 - tiny)
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


@POLICY_LOSSES.register(
    "gspo",
    config=GSPOLoss,
    paper="2507.18071",
    formula="-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean_t log r_t); "
    "token form: s_t = sg(s) exp(log p_t - sg(log p_t))",
    gradients={"loss": "on_policy_gradient"},
)
def gspo_loss(batch: TokenBatch, config: GSPOLoss) -> TokenLoss:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s the geometric mean of a sample's ratios.

    GSPO and GSPO-token (arXiv 2507.18071, eqs. 5 to 7 and 13, 14). The token form has the value of s and, of each
    token, the gradient of its own logprob, so that tokens may have advantages of their own.
    """
    mean_log = batch.sequence_means(log_ratios(batch, config.anchor))[batch.sequence_index]
    ratios = None
    if config.form == "token":
        logprobs = masked_logprobs(batch)
        ratios = bounded_exp(mean_log).detach() * (logprobs - logprobs.detach()).exp()
    return clipped_surrogate(
        mean_log, batch, clip_low=config.clip_low, clip_high=config.clip_high, ratios=ratios
    )


@POLICY_LOSSES.register(
    "luspo",
    config=LUSPOLoss,
    paper="2602.05261",
    formula="n gspo, n the trainable tokens of the context",
)
def luspo_loss(batch: TokenBatch, config: LUSPOLoss) -> TokenLoss:
    """GSPO's loss times the number of trainable tokens of the sample (arXiv 2602.05261)."""
    section = GSPOLoss(
        kind="gspo", anchor=config.anchor, clip_low=config.clip_low, clip_high=config.clip_high
    )
    loss = gspo_loss(batch, section)
    lengths = batch.sequence_sums(torch.ones_like(loss.values))[batch.sequence_index]
    return TokenLoss(values=lengths * loss.values, clipped=loss.clipped)


@POLICY_LOSSES.register(
    "gmpo",
    config=GMPOLoss,
    paper="2507.20673",
    formula="-A exp(mean_t c_t), c_t = min(log r_t, clip_high) where A > 0, max(log r_t, -clip_low) elsewhere",
    gradients={"loss": "on_policy_gradient"},
)
def gmpo_loss(batch: TokenBatch, config: GMPOLoss) -> TokenLoss:
    """-A times the geometric mean of a sample's ratios, each bounded the way that its advantage pushes it.

    GMPO (arXiv 2507.20673, eq. 4), whose bounds are those of log-ratios: exp(-clip_low) and exp(clip_high).
    """
    free = log_ratios(batch, config.anchor)
    advantages = masked_advantages(batch)
    bounded = torch.where(advantages > 0, free.clamp(max=config.clip_high), free.clamp(min=-config.clip_low))
    means = batch.sequence_means(bounded)[batch.sequence_index]
    clipped = (bounded != free).detach() & batch.mask
    return TokenLoss(
        values=-bounded_exp(means) * advantages, clipped=clipped | is_beyond_bound(means, batch.mask)
    )


@POLICY_LOSSES.register(
    "vespo",
    config=VESPOLoss,
    paper="2602.10693",
    formula="-sg(w^k exp(rate (1 - w))) A log p, w = prod_t r_t, k and rate by the sign of A",
    gradients={"loss": "on_policy_gradient"},
)
def vespo_loss(batch: TokenBatch, config: VESPOLoss) -> TokenLoss:
    """REINFORCE, each sample weighted by w^k exp(rate (1 - w)) of the product w of its ratios (arXiv 2602.10693).

    The weight is 1 on-policy and goes to 0 for what policy and anchor agree on least. Nothing is clipped.
    """
    logs = batch.sequence_sums(log_ratios(batch, config.anchor).detach())[batch.sequence_index]
    advantages = masked_advantages(batch)
    positive = advantages >= 0
    power = torch.full_like(logs, config.power_negative).masked_fill(positive, config.power_positive)
    rate = torch.full_like(logs, config.rate_negative).masked_fill(positive, config.rate_positive)
    weights = (power * logs + rate * (1 - bounded_exp(logs))).exp()
    return TokenLoss(
        values=-weights * advantages * masked_logprobs(batch), clipped=torch.zeros_like(batch.mask)
    )


@POLICY_LOSSES.register(
    "supervised",
    config=SupervisedLoss,
    paper="cross-entropy",
    formula="-log p",
)
def supervised_loss(batch: TokenBatch, config: SupervisedLoss) -> TokenLoss:
    """-log p of each trainable token, whatever its advantage."""
    return TokenLoss(
        values=-torch.where(batch.mask, batch.logprobs, 0.0), clipped=torch.zeros_like(batch.mask)
    )


@POLICY_LOSSES.register(
    "reinforce",
    config=ReinforceLoss,
    paper="Williams 1992",
    formula="-sg(r) A log p",
    gradients={"loss": "policy_gradient"},
)
def reinforce_loss(batch: TokenBatch, config: ReinforceLoss) -> TokenLoss:
    """-sg(policy / anchor) A log p: token by token the policy gradient, whoever drew the tokens.

    Williams 1992 with importance weights. Against `behavior` it is unbiased in the token's own distribution; the
    contexts are still those that the sampler reached.
    """
    logs = log_ratios(batch, config.anchor)
    return _weighted(batch, bounded_exp(logs), is_beyond_bound(logs, batch.mask))


@POLICY_LOSSES.register(
    "policy_gradient",
    config=PolicyGradientLoss,
    paper="Williams 1992",
    formula="-A log p",
    gradients={"loss": "on_policy_gradient"},
)
def policy_gradient_loss(batch: TokenBatch, config: PolicyGradientLoss) -> TokenLoss:
    """-A log p (Williams 1992)."""
    return _weighted(batch, torch.ones_like(batch.logprobs), torch.zeros_like(batch.mask))


@POLICY_LOSSES.register(
    "cispo",
    config=CISPOLoss,
    paper="2506.13585, 2510.13786",
    formula="-sg(clip(r, ratio_floor, ratio_cap)) A log p",
    gradients={"loss": "on_policy_gradient"},
)
def cispo_loss(batch: TokenBatch, config: CISPOLoss) -> TokenLoss:
    """-sg(clip(r, ratio_floor, ratio_cap)) A log p.

    CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4), there without a floor; the cap is a ratio, as in arXiv 2510.13786.
    """
    ratios = token_ratios(batch, config.anchor)
    weights = ratios.clamp(config.ratio_floor, config.ratio_cap)
    return _weighted(batch, weights, (weights != ratios).detach() & batch.mask)


@POLICY_LOSSES.register(
    "topr",
    config=TOPRLoss,
    paper="2503.14286",
    formula="-A log p where A >= 0, -sg(min(r, ratio_cap)) A log p elsewhere",
    gradients={"loss": "on_policy_gradient"},
)
def topr_loss(batch: TokenBatch, config: TOPRLoss) -> TokenLoss:
    """-A log p where A >= 0, and -sg(min(r, ratio_cap)) A log p elsewhere.

    Tapered off-policy REINFORCE (arXiv 2503.14286, eq. 7), token by token: what is good is learnt however unlikely it
    has become, what is bad is forgotten only as far as it is still likely.
    """
    ratios = token_ratios(batch, config.anchor)
    negative = masked_advantages(batch) < 0
    weights = torch.where(negative, ratios.clamp(max=config.ratio_cap), 1.0)
    return _weighted(batch, weights, (negative & (ratios > config.ratio_cap)).detach() & batch.mask)


def _weighted(batch: TokenBatch, weights: torch.Tensor, clipped: torch.Tensor) -> TokenLoss:
    return TokenLoss(
        values=-weights.detach() * masked_advantages(batch) * masked_logprobs(batch), clipped=clipped
    )


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    old_values: torch.Tensor | None = None,
    clip: float | None = None,
) -> TokenLoss:
    """PPO's clipped loss of a critic: 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    As in PPO's reference implementation (arXiv 1707.06347; described in 2005.12729). The larger of the two keeps the
    critic from moving further than c from where it was in one step, unless that brings it nothing.

    Args:
        values: [N], of the critic as it is, with gradient.
        returns: [N], what it should have expected.
        mask: [N] bool, the trainable tokens; the others have loss 0 and no gradient, whatever stands there.
        old_values: [N], of the critic at the start of the step; only used with `clip`.
        clip: c; None: the plain squared error.
    """
    values = torch.where(mask, values, 0.0)
    returns = torch.where(mask, returns, 0.0).detach()
    errors = (values - returns).square()
    if clip is None:
        return TokenLoss(values=0.5 * errors, clipped=torch.zeros_like(mask))
    assert old_values is not None, "to clip the change of values, the old ones are needed"
    old = torch.where(mask, old_values, 0.0).detach()
    bounded = old + (values - old).clamp(-clip, clip)
    bounded_errors = (bounded - returns).square()
    return TokenLoss(
        values=0.5 * torch.maximum(errors, bounded_errors),
        clipped=(bounded_errors > errors).detach() & mask,
    )
