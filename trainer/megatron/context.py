"""How context-parallel ranks share the tokens of a pack.

Each sequence is cut into 2 x size chunks of one length, and rank r holds the chunks r and 2 x size - 1 - r, one from
each end: with causal attention, where later tokens look at more keys, every rank then has the same work. This is the
order of Transformer Engine's packed (THD) layout, which Megatron-core's rotary embeddings follow, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextSlice:
    """Which part of each sequence a rank holds."""

    size: int = 1
    rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        """What the length of every sequence must be a multiple of."""
        return 2 * self.size if self.size > 1 else 1

    def chunk_length(self, length: int) -> int:
        """Of a sequence of this (padded) length."""
        num_chunks = 2 * self.size
        assert length % num_chunks == 0, (
            f"a sequence of {length} tokens does not divide into {num_chunks} chunks"
        )
        return length // num_chunks

    def positions(self, lengths: Sequence[int]) -> torch.Tensor:
        """[T / size]: the place in the pack of each token that this rank holds, given the sequences' lengths."""
        if self.size == 1:
            return torch.arange(sum(lengths))
        parts: list[torch.Tensor] = []
        start = 0
        for length in lengths:
            chunk = self.chunk_length(length)
            for number in (self.rank, 2 * self.size - 1 - self.rank):
                parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
            start += length
        return torch.cat(parts)


def whole_order(lengths: Sequence[int], size: int) -> torch.Tensor:
    """[T]: where each token of the pack lies when the ranks' tokens stand one rank behind the other."""
    gathered = torch.cat([ContextSlice(size=size, rank=rank).positions(lengths) for rank in range(size)])
    return gathered.argsort()


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, own: torch.Tensor, num_rows: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(own)
        # Every row is one rank's, so the sum only ever adds zeros.
        spread = values.new_zeros(num_rows, *values.shape[1:])
        spread.index_copy_(0, own, values)
        dist.all_reduce(spread, group=group)
        return spread

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (own,) = ctx.saved_tensors
        return grad.index_select(0, own), None, None, None


def spread_rows(
    values: torch.Tensor, own: torch.Tensor, num_rows: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Values [M, ...] of this rank's rows -> those of all rows [N, ...], the same on every rank of the group.

    Each rank goes on to compute the same loss of all rows; the gradient flows back into its own alone, so that the sum
    of the ranks' gradients is the gradient of one loss.

    Args:
        own: [M]: which of the N rows are this rank's. Every row is exactly one rank's.
    """
    return _Spread.apply(values, own, num_rows, group)
