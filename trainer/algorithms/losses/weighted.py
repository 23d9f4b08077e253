"""REINFORCE with detached weights: the gradient of a token is that of its logprob, times weight and advantage."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import CISPOLoss, PolicyGradientLoss, ReinforceLoss, TOPRLoss
from polyturn.trainer.algorithms.losses.anchors import (
    log_ratios,
    masked_advantages,
    masked_logprobs,
    token_ratios,
)
from polyturn.trainer.algorithms.ratios import bounded_exp, is_beyond_bound
from polyturn.trainer.algorithms.registry import POLICY_LOSSES
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss


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
