"""From per-token values to one number, with the denominators of the whole optimizer update.

A reduction is a weight for each token: the loss is the sum of weight times value. The weights come from the global
batch, before it is split into micro-batches or over ranks, so the sum over all parts is the same however it is split,
and gradients of the parts are added, never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Reduction = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalCounts:
    """The denominators of one optimizer update, over all micro-batches and ranks."""

    num_tokens: int
    """Trainable tokens."""
    num_sequences: int
    """Sequences with at least one trainable token."""

    @classmethod
    def of(cls, num_trainable: Iterable[int]) -> GlobalCounts:
        """Count from the number of trainable tokens of each sequence."""
        numbers = [number for number in num_trainable if number > 0]
        return cls(num_tokens=sum(numbers), num_sequences=len(numbers))


def token_weights(
    mask: torch.Tensor, sequence_lengths: torch.Tensor, *, reduction: Reduction, counts: GlobalCounts
) -> torch.Tensor:
    """The weight of each token, float32, of the shape of `mask`; 0 where the mask is.

    token_mean: 1 / N for the N trainable tokens. sequence_mean: 1 / (B n_i) for the B sequences with trainable tokens,
    n_i of them in sequence i.

    Args:
        mask: bool, the trainable tokens.
        sequence_lengths: of the shape of `mask`, or broadcast to it: n_i of the token's sequence, counted in the
            whole sequence.
    """
    weights = mask.to(torch.float32)
    if reduction == "token_mean":
        return weights / max(counts.num_tokens, 1)
    assert reduction == "sequence_mean", reduction
    return weights / (max(counts.num_sequences, 1) * sequence_lengths.clamp(min=1))


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weight times value. A value whose weight is 0 has no part in it, not even as NaN."""
    return (torch.where(weights > 0, values, 0.0) * weights).sum()
