"""PPO's clipped surrogate."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import ClipLoss
from polyturn.trainer.algorithms.losses.anchors import log_ratios, masked_advantages
from polyturn.trainer.algorithms.ratios import bounded_exp, is_beyond_bound
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
