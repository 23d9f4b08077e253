"""PPO's clipped surrogate."""

from __future__ import annotations

import torch

from polyturn.configs.losses import ClipLoss
from polyturn.trainer.algorithms.losses.anchors import masked_advantages, token_ratios
from polyturn.trainer.algorithms.registry import POLICY_LOSSES
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss


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
        token_ratios(batch, config.anchor), batch, clip_low=config.clip_low, clip_high=config.clip_high
    )
    if config.dual_clip is None:
        return loss
    advantages = masked_advantages(batch)
    ceiling = config.dual_clip * advantages.abs()
    beyond = (advantages < 0) & (loss.values > ceiling)
    return TokenLoss(values=torch.where(beyond, ceiling, loss.values), clipped=loss.clipped | beyond.detach())


def clipped_surrogate(
    ratios: torch.Tensor, batch: TokenBatch, *, clip_low: float, clip_high: float
) -> TokenLoss:
    """PPO's surrogate of the given ratios [N], which may be those of tokens or of what they are part of."""
    advantages = masked_advantages(batch)
    free = -ratios * advantages
    bounded = -ratios.clamp(1 - clip_low, 1 + clip_high) * advantages
    return TokenLoss(values=torch.maximum(free, bounded), clipped=(bounded > free).detach() & batch.mask)
