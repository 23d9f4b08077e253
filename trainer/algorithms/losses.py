"""Policy losses, token by token. A reduction weighs and sums them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before exp: a ratio of 5e8 is as good as any larger one, and finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLoss:
    """A loss of each token; 0, without gradient, where the mask is."""

    values: torch.Tensor
    clipped: torch.Tensor
    """bool: tokens whose gradient the clip took away."""


def log_ratio(logprobs: torch.Tensor, anchor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log(policy / anchor) at trainable tokens, 0 elsewhere, whatever stands in masked slots."""
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, anchor, 0.0)


def clip_loss(
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """PPO's clipped surrogate with its own upper bound: -min(r A, clip(r, 1 - low, 1 + high) A), r = policy / proximal.

    From arXiv 1707.06347 (eq. 7), the upper bound of its own from 2503.14476. All tensors have one shape.
    """
    ratio = log_ratio(logprobs, proximal_logprobs.detach(), mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = torch.where(mask, advantages, 0.0)
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return TokenLoss(values=-torch.minimum(free, bounded), clipped=(bounded < free).detach() & mask)


def supervised_loss(logprobs: torch.Tensor, mask: torch.Tensor) -> TokenLoss:
    """Cross-entropy: -log p of each trainable token."""
    return TokenLoss(values=-torch.where(mask, logprobs, 0.0), clipped=torch.zeros_like(mask))
