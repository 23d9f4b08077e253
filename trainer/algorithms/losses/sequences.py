"""Losses with one ratio for all trainable tokens of a sample.

Every token of a sample has the sample's loss as its value, so that a mean over the tokens of a sample is its loss; a
sum over them is the number of its tokens times that.
"""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import GMPOLoss, GSPOLoss, LUSPOLoss, VESPOLoss
from polyturn.trainer.algorithms.losses.anchors import log_ratios, masked_advantages, masked_logprobs
from polyturn.trainer.algorithms.losses.clip import clipped_surrogate
from polyturn.trainer.algorithms.ratios import bounded_exp, is_beyond_bound
from polyturn.trainer.algorithms.registry import POLICY_LOSSES
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss


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
