"""Which part of a tensor a rank holds, and what two such parts share.

Tensor, pipeline and expert parallelism give a rank a box of a global tensor; the distributed optimizer gives it a
range of that box's elements, counted row by row. A range of a box is a handful of smaller boxes, and boxes are easy to
intersect: that is all it takes to load what one layout wrote into another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A box of a global tensor, and where its elements lie in a rank's flat tensor."""

    key: str
    """The global tensor's name."""
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of its first element in the global tensor."""
    shape: tuple[int, ...]
    """As many dimensions as the global tensor has."""
    flat_start: int
    """Where its first element lies in the rank's flat tensor; the others follow row by row."""
    padded: bool
    """The global tensor's size depends on the layout (a padded vocabulary): what no rank wrote is zero."""
    main: bool
    """Of several ranks that hold the same box, the one whose copy counts."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def as_json(self) -> list[Any]:
        """The fields in their order, as `from_json` takes them."""
        return [
            self.key,
            list(self.global_shape),
            list(self.offset),
            list(self.shape),
            self.flat_start,
            self.padded,
            self.main,
        ]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Box:
        key, global_shape, offset, shape, flat_start, padded, main = fields
        return cls(
            key=key,
            global_shape=tuple(global_shape),
            offset=tuple(offset),
            shape=tuple(shape),
            flat_start=flat_start,
            padded=padded,
            main=main,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slab:
    """A box of a global tensor whose elements follow each other in some flat tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    flat_start: int


def slabs(box: Box, start: int, end: int) -> Iterator[Slab]:
    """The elements [start, end) of a rank's flat tensor that belong to `box`, as slabs of the global tensor.

    `flat_start` of a slab counts from `start`, for the range is what the rank stores.
    """
    first = max(start, box.flat_start) - box.flat_start
    last = min(end, box.flat_start + box.num_elements) - box.flat_start
    if first >= last:
        return
    for offset, shape, flat in _split_range(box.shape, first, last):
        yield Slab(
            offset=tuple(a + b for a, b in zip(box.offset, offset, strict=True)),
            shape=shape,
            flat_start=box.flat_start + flat - start,
        )


def _split_range(
    shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """A range of a box's elements as boxes (offset, shape, first element): at most two for each dimension and one.

    Of a box [4, 5], the range [3, 17) is the end of row 0, rows 1 and 2, and the beginning of row 3.
    """
    if not shape:
        yield (), (), first
        return
    row = math.prod(shape[1:])
    if row == 0:
        return
    while first < last:
        index, within = divmod(first, row)
        if within == 0 and last - first >= row:
            num_rows = (last - first) // row
            zeros = (0,) * (len(shape) - 1)
            yield (index, *zeros), (num_rows, *shape[1:]), first
            first += num_rows * row
            continue
        stop = min(last, (index + 1) * row)
        for offset, part, flat in _split_range(shape[1:], within, stop - index * row):
            yield (index, *offset), (1, *part), index * row + flat
        first = stop


def overlap(ours: Slab, theirs: Slab) -> bool:
    """Whether two slabs of one tensor have elements in common."""
    low, high = _common(ours, theirs)
    return all(a < b for a, b in zip(low, high, strict=True))


def copy_shared(target: torch.Tensor, ours: Slab, source: torch.Tensor, theirs: Slab) -> int:
    """Copy what both slabs hold from the flat tensor `source` into the flat tensor `target`; the elements copied."""
    if not overlap(ours, theirs):
        return 0
    low, high = _common(ours, theirs)
    _window(target, ours, low, high).copy_(_window(source, theirs, low, high))
    return math.prod(b - a for a, b in zip(low, high, strict=True))


def _common(ours: Slab, theirs: Slab) -> tuple[list[int], list[int]]:
    """The first and the end of what both hold, by dimension."""
    low = [max(a, b) for a, b in zip(ours.offset, theirs.offset, strict=True)]
    high = [
        min(a + n, b + m)
        for a, n, b, m in zip(ours.offset, ours.shape, theirs.offset, theirs.shape, strict=True)
    ]
    return low, high


def _window(flat: torch.Tensor, slab: Slab, low: Sequence[int], high: Sequence[int]) -> torch.Tensor:
    view = flat[slab.flat_start : slab.flat_start + math.prod(slab.shape)].view(slab.shape)
    return view[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, slab.offset, strict=True))]
