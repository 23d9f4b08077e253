"""PPO's clipped surrogate."""

from __future__ import annotations

import torch

from polyturn.configs.losses import ClipLoss
from polyturn.trainer.algorithms.losses.anchors import anchor_logprobs
from polyturn.trainer.algorithms.ratios import bounded_exp, log_ratio
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
    ratio = bounded_exp(log_ratio(batch.logprobs, anchor_logprobs(batch, config.anchor), batch.mask))
    advantages = torch.where(batch.mask, batch.advantages, 0.0)
    free = -ratio * advantages
    bounded = -ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    values = torch.maximum(free, bounded)
    clipped = bounded > free
    if config.dual_clip is not None:
        ceiling = config.dual_clip * advantages.abs()
        beyond = (advantages < 0) & (values > ceiling)
        values = torch.where(beyond, ceiling, values)
        clipped = clipped | beyond
    return TokenLoss(values=values, clipped=clipped.detach() & batch.mask)
