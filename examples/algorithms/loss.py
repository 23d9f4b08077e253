"""A policy loss of one's own: SPO, which holds the ratio near 1 by a parabola instead of a clip."""

from __future__ import annotations

import torch

from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss, bounded_exp, log_ratio


def simple_policy_optimization(batch: TokenBatch, *, epsilon: float = 0.2) -> TokenLoss:
    """-(r A - |A| / (2 epsilon) (r - 1)^2) with r = policy / proximal (SPO, arXiv 2401.16025).

    Its best ratio is 1 + epsilon sign(A), as PPO's is; beyond, the gradient turns back instead of vanishing.
    """
    ratio = bounded_exp(log_ratio(batch.logprobs, batch.proximal_logprobs.detach(), batch.mask))
    advantages = torch.where(batch.mask, batch.advantages, 0.0)
    values = -(ratio * advantages - advantages.abs() / (2 * epsilon) * (ratio - 1).square())
    turned = (ratio.detach() - 1) * advantages.sign() > epsilon
    return TokenLoss(values=values, clipped=turned & batch.mask)
