"""What the tokens of a pack were drawn from, as the output layer needs it: all other logits are out of reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyturn.agents.sampling_support import SamplingSupport

LOWEST = -1e30
"""Below any logit, and finite, so that 0 times it is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSupport:
    """What the targets of N rows were drawn from, on a device.

    A target that was drawn from itself alone has logprob 0, entropy 0 and no gradient. The model is asked for the
    other R rows; their supports are pairs of one of them and a token id, row after row.
    """

    open_rows: torch.Tensor
    """[R] int64, ascending: which of the N rows they are."""
    row_of: torch.Tensor
    """[P] int64, ascending: which of the R rows each pair is of."""
    token_ids: torch.Tensor
    """[P] int64"""
    offsets: npt.NDArray[np.int64]
    """[R + 1], on the host: where the pairs of each row begin, and the end."""
    is_restricted: torch.Tensor
    """[R]: rows without pairs were drawn from the whole vocabulary."""

    @classmethod
    def of(cls, support: SamplingSupport, device: torch.device) -> RowSupport:
        """Of N rows as the samples have them."""
        open_rows = np.flatnonzero(support.sizes != 1)
        asked = support.take(open_rows)
        return cls(
            open_rows=torch.from_numpy(open_rows).to(device),
            row_of=torch.from_numpy(np.repeat(np.arange(len(asked)), asked.sizes)).to(device),
            token_ids=torch.from_numpy(asked.token_ids.astype(np.int64)).to(device),
            offsets=asked.offsets,
            is_restricted=torch.from_numpy(asked.sizes > 0).to(device),
        )

    def restrict(self, tile: torch.Tensor, rows: slice, first_token: int) -> None:
        """Put every logit of a tile out of reach that is not among its row's.

        Args:
            tile: [rows, columns], contiguous; changed in place.
            rows: among the R.
            first_token: the id of its first column.
        """
        if tile.numel() == 0:
            return
        low, high = (int(self.offsets[row]) for row in (rows.start, rows.stop))
        places = self.token_ids[low:high] - first_token
        width = tile.size(1)
        is_here = (places >= 0) & (places < width)
        flat = tile.view(-1)
        targets = (self.row_of[low:high] - rows.start) * width + places.clamp(0, width - 1)
        values = torch.where(is_here, flat[targets], LOWEST)
        tile.masked_fill_(self.is_restricted[rows, None], LOWEST)
        # Pairs of other columns share a place with one of these, and are below it.
        flat.scatter_reduce_(0, targets, values, "amax")
