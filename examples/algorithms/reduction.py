"""A reduction of one's own: between the mean over tokens and the mean over sequences."""

from __future__ import annotations

import torch

from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch


def root_length(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, *, power: float = 0.5
) -> torch.Tensor:
    """1 / (B n_i ** power) for sequence i with n_i trainable tokens: a sequence weighs n_i ** (1 - power).

    With power 1 all sequences weigh the same, with power 0 all tokens do. B and n_i are those of the whole update, so
    the weights do not depend on micro-batches or ranks.
    """
    lengths = batch.sequence_lengths.clamp(min=1).to(torch.float32)
    return mask.to(torch.float32) / (max(counts.num_sequences, 1) * lengths**power)
