"""What a ratio is against."""

from __future__ import annotations

import torch

from polyturn.configs.losses import Anchor
from polyturn.trainer.algorithms.tokens import TokenBatch


def anchor_logprobs(batch: TokenBatch, anchor: Anchor) -> torch.Tensor:
    """The logprobs [N] of the anchor of that name, without gradient."""
    if anchor == "behavior":
        return batch.behavior_logprobs.detach()
    return batch.proximal_logprobs.detach()
