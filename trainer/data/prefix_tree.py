"""Samples that begin alike as a tree: every shared prefix stands in it once.

Segments of one episode branch where its history was rewritten, and the episodes of a group share at least the prompt.
What a causal model computes of a token depends on the tokens before it and on nothing else, so equal prefixes need to
be computed only once, whatever was sampled in them and by whomever.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_SHARED = 16
"""Shorter runs are not worth a node of their own: they are computed once for each branch."""
Tokens = npt.NDArray[np.signedinteger[Any]]
Branch = tuple[int, int, int]
"""(first, last, end): the sorted samples [first, last) are alike in their first `end` tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A run of tokens; its ancestors are what stands before it, its descendants lie right behind it."""

    start: int
    """Where its first token stands in the tree."""
    end: int
    descendants_end: int
    """Where the last of its descendants ends; `end` for a leaf."""
    depth: int
    """The position of its first token in every sample that it is of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixTree:
    """Several samples as a forest of T tokens, each node before its descendants."""

    token_ids: Tokens
    """[T]"""
    positions: Tokens
    """[T]: of each token in its samples."""
    nodes: tuple[Node, ...]
    """By `start`."""
    paths: tuple[Tokens, ...]
    """For each sample, where its tokens stand in the tree."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def sharing(self) -> Sharing:
        return replace(
            Sharing.none([len(path) for path in self.paths]),
            num_tokens=self.num_tokens,
            num_pairs=int((self.positions + 1).sum()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """What is computed with shared prefixes, and what would be of each sample by itself."""

    num_tokens: int = 0
    num_pairs: int = 0
    """Of a token and one that it attends to, itself included."""
    num_separate_tokens: int = 0
    num_separate_pairs: int = 0

    @classmethod
    def none(cls, lengths: Sequence[int]) -> Sharing:
        """Of samples of these lengths that share nothing."""
        num_tokens, num_pairs = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
        return cls(
            num_tokens=num_tokens,
            num_pairs=num_pairs,
            num_separate_tokens=num_tokens,
            num_separate_pairs=num_pairs,
        )

    def __add__(self, other: Sharing) -> Sharing:
        return Sharing(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def saved_fraction(self, *, token: float = 0.0, pair: float = 0.0) -> float:
        """The share that is saved of what a token and a pair cost."""
        separate = token * self.num_separate_tokens + pair * self.num_separate_pairs
        return 1 - (token * self.num_tokens + pair * self.num_pairs) / separate if separate else 0.0


def build_tree(samples: Sequence[Tokens], *, min_shared: int = MIN_SHARED) -> PrefixTree:
    """The tree of these token sequences, none of them empty. Sequences that are equal share all of their tokens."""
    order, shared = prefix_order(samples)
    ordered = [samples[index] for index in order]
    branches = _Branches(lengths=[len(sample) for sample in ordered], shared=shared, min_shared=min_shared)
    starts, ends, depths = [], [], []
    token_ids: list[Tokens] = []
    paths: list[Tokens] = [np.zeros(0, dtype=np.int64)] * len(samples)
    # Depth first: what lies behind a node is put on top of what lies beside it.
    waiting: list[tuple[Branch, int, tuple[Tokens, ...]]] = []
    if order:
        waiting += [(branch, 0, ()) for branch in reversed(branches.behind(0, len(order), 0))]
    num_tokens = 0
    while waiting:
        (first, last, end), depth, path = waiting.pop()
        if end > depth:
            starts.append(num_tokens)
            num_tokens += end - depth
            ends.append(num_tokens)
            depths.append(depth)
            token_ids.append(ordered[first][depth:end])
            path = (*path, np.arange(starts[-1], num_tokens))
        if last - first == 1:
            paths[order[first]] = _joined(path)
        else:
            waiting += [(branch, end, path) for branch in reversed(branches.behind(first, last, end))]
    return PrefixTree(
        token_ids=_joined(token_ids),
        positions=_joined(
            [np.arange(d, d + end - start) for start, end, d in zip(starts, ends, depths, strict=True)]
        ),
        nodes=_nodes(starts, ends, depths),
        paths=tuple(paths),
    )


def _nodes(starts: Sequence[int], ends: Sequence[int], depths: Sequence[int]) -> tuple[Node, ...]:
    """From the last node to the first: a node's descendants end where the next node that is no deeper begins."""
    descendants = [ends[-1]] * len(starts) if starts else []
    following: list[int] = []
    for number in reversed(range(len(starts))):
        while following and depths[following[-1]] > depths[number]:
            following.pop()
        descendants[number] = starts[following[-1]] if following else ends[-1]
        following.append(number)
    return tuple(
        Node(start=start, end=end, descendants_end=last, depth=depth)
        for start, end, last, depth in zip(starts, ends, descendants, depths, strict=True)
    )


def prefix_order(samples: Sequence[Tokens]) -> tuple[list[int], list[int]]:
    """The samples in lexicographic order, so that those with a common prefix are neighbours.

    Returns their indices, and how many tokens each shares with the one before it (0 for the first).
    """
    # Big-endian bytes compare as the tokens do.
    keys = [sample.astype(">u4").tobytes() for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: keys[i])
    shared = [0] * len(order)
    for place in range(1, len(order)):
        shared[place] = common_prefix(samples[order[place - 1]], samples[order[place]])
    return order, shared


def common_prefix(left: Tokens, right: Tokens) -> int:
    """How many tokens both begin with."""
    length = min(len(left), len(right))
    different = left[:length] != right[:length]
    return int(different.argmax()) if different.any() else length


@dataclass(frozen=True, kw_only=True, slots=True)
class _Branches:
    """Where sorted samples part."""

    lengths: Sequence[int]
    shared: Sequence[int]
    min_shared: int

    def behind(self, low: int, high: int, depth: int) -> list[Branch]:
        """How the samples [low, high) go on behind their first `depth` tokens."""
        return list(self._part(low, high, depth, depth))

    def _part(self, low: int, high: int, depth: int, common: int) -> Iterator[Branch]:
        """The same where the samples have `common` tokens in common, but too few of them behind `depth`.

        Those that have more in common go on together, and each branch gets the common run for itself.
        """
        cuts = [low, *(i for i in range(low + 1, high) if self.shared[i] <= common), high]
        for first, last in itertools.pairwise(cuts):
            if last - first == 1:
                yield first, last, self.lengths[first]
                continue
            end = min(self.shared[first + 1 : last])
            if end - depth >= self.min_shared:
                yield first, last, end
            else:
                yield from self._part(first, last, depth, end)


def _joined(parts: Sequence[Tokens]) -> Tokens:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
