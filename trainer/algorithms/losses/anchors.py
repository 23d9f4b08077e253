"""What a ratio is against."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import Anchor
from polyturn.trainer.algorithms.ratios import bounded_exp, log_ratio
from polyturn.trainer.algorithms.tokens import TokenBatch


def log_ratios(batch: TokenBatch, anchor: Anchor) -> torch.Tensor:
    """log(policy / anchor) of each token, [N], with the policy's gradient; 0 where the mask is False."""
    anchors = {"proximal": batch.proximal_logprobs, "behavior": batch.behavior_logprobs}
    return log_ratio(batch.logprobs, anchors[anchor].detach(), batch.mask)


def token_ratios(batch: TokenBatch, anchor: Anchor) -> torch.Tensor:
    """policy / anchor of each token, [N], with the policy's gradient; 1 where the mask is False."""
    return bounded_exp(log_ratios(batch, anchor))


def masked_advantages(batch: TokenBatch) -> torch.Tensor:
    """The advantages [N], 0 where the mask is False."""
    return torch.where(batch.mask, batch.advantages, 0.0)


def masked_logprobs(batch: TokenBatch) -> torch.Tensor:
    """The policy's logprobs [N] with their gradient, 0 where the mask is False."""
    return torch.where(batch.mask, batch.logprobs, 0.0)
