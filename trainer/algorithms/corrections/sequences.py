"""What corrections compute of sequences.

All functions take the tokens of a step, of shape [N], and `sequence_index`, which says which sequence a token is of.
"""

from __future__ import annotations

import torch


def over_sequences(
    values: torch.Tensor, mask: torch.Tensor, sequence_index: torch.Tensor, how: str
) -> torch.Tensor:
    """The sum, mean or max over the trainable tokens of each token's sequence, [N]; 0 for a sequence without any."""
    count = int(sequence_index.max()) + 1 if len(sequence_index) else 0
    index, kept = sequence_index[mask], values[mask]
    if how == "max":
        # A NaN is kept by amax; -inf is what a sequence without trainable tokens is left with.
        found = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device)
        found = found.scatter_reduce(0, index, kept, reduce="amax")
        return torch.where(found == -torch.inf, 0.0, found)[sequence_index]
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, index, kept)
    if how == "mean":
        sums = sums / torch.bincount(index, minlength=count).clamp(min=1)
    return sums[sequence_index]


def fraction(part: torch.Tensor, mask: torch.Tensor) -> float:
    """The part of the trainable tokens at which `part` is true; 0 where there are none."""
    return float((part & mask).sum()) / max(int(mask.sum()), 1)


def sequence_fraction(part: torch.Tensor, mask: torch.Tensor, sequence_index: torch.Tensor) -> float:
    """The part of the sequences with trainable tokens in which `part` is true at one of these; 0 without any."""
    found = len(torch.unique(sequence_index[part & mask]))
    return found / max(len(torch.unique(sequence_index[mask])), 1)
