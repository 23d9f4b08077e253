"""The tokens that a sampler could have drawn, where top-p, top-k or min-p left it only some of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SamplingSupport:
    """For each of T tokens the ids of the tokens that it was drawn from, itself among them: rows of unequal length.

    An empty row says that nothing was left out, or that the token was not sampled. With T = 3, drawn from [7, 3], from
    the whole vocabulary and from [5]:

        sizes      2  0  1
        token_ids  7  3  5
    """

    sizes: npt.NDArray[np.int32]
    """[T]"""
    token_ids: npt.NDArray[np.int32]
    """[sum of sizes]: row after row."""

    def __post_init__(self) -> None:
        for name in ("sizes", "token_ids"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int32))
        assert self.sizes.ndim == self.token_ids.ndim == 1, "a support has two flat columns"
        assert int(self.sizes.sum()) == len(self.token_ids), "the sizes are not those of the ids"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingSupport):
            return NotImplemented
        return np.array_equal(self.sizes, other.sizes) and np.array_equal(self.token_ids, other.token_ids)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """[T + 1]: where each row begins, and the end."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.sizes, dtype=np.int64)])

    def take(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> SamplingSupport:
        """The rows that a mask [T] or ascending indices choose."""
        mask = np.zeros(len(self), dtype=np.bool_)
        mask[chosen] = True
        return SamplingSupport(sizes=self.sizes[mask], token_ids=self.token_ids[np.repeat(mask, self.sizes)])

    @classmethod
    def unrestricted(cls, length: int) -> SamplingSupport:
        """Of `length` tokens, none of which was drawn from fewer than all."""
        return cls(sizes=np.zeros(length, dtype=np.int32), token_ids=np.zeros(0, dtype=np.int32))

    @classmethod
    def joined(
        cls, parts: Sequence[SamplingSupport | None], lengths: Sequence[int]
    ) -> SamplingSupport | None:
        """One behind the other; a part that is None is `lengths` unrestricted tokens. None where all parts are."""
        if all(part is None for part in parts):
            return None
        rows = [
            cls.unrestricted(length) if part is None else part
            for part, length in zip(parts, lengths, strict=True)
        ]
        return cls(
            sizes=np.concatenate([part.sizes for part in rows]),
            token_ids=np.concatenate([part.token_ids for part in rows]),
        )
