"""Cross-entropy."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import SupervisedLoss
from polyturn.trainer.algorithms.registry import POLICY_LOSSES
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss


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
