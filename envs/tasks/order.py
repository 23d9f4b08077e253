"""In which order tasks are drawn: which task, and of which epoch, at any position, without what came before."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from polyturn.envs.tasks.mixture import MixtureTasks
from polyturn.envs.tasks.types import TaskSource

MAX_LISTED = 1 << 20
"""A shuffle of more tasks than this is computed for each position, not held as a list."""
MIN_BLOCK = 64
MAX_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Draw:
    """What stands at one position of an order."""

    task_index: int
    epoch: int
    """How many times all tasks of the source were drawn before."""


class DrawOrder(Protocol):
    """Positions 0, 1, 2, ... without end. The draw at a position follows from the order's seed and it alone."""

    def __getitem__(self, position: int, /) -> Draw: ...


def draw_order(source: TaskSource, *, seed: int) -> DrawOrder:
    """The order in which a source is trained on."""
    if isinstance(source, MixtureTasks):
        return MixtureOrder(source, seed=seed)
    return ShuffledOrder(len(source), seed=seed)


class ShuffledOrder:
    """Every task once per epoch, each epoch in another order."""

    def __init__(self, num_tasks: int, *, seed: int) -> None:
        """Raises `ValueError` for an empty task source."""
        if num_tasks < 1:
            raise ValueError("the task source is empty: there is nothing to train on")
        self._num_tasks = num_tasks
        self._seed = seed
        self._epoch = -1
        self._listed = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int, /) -> Draw:
        epoch, index = divmod(position, self._num_tasks)
        if self._num_tasks > MAX_LISTED:
            return Draw(permuted(index, self._num_tasks, f"{self._seed}/{epoch}"), epoch)
        if epoch != self._epoch:
            self._listed = np.random.default_rng([self._seed, epoch]).permutation(self._num_tasks)
            self._epoch = epoch
        return Draw(int(self._listed[index]), epoch)


class MixtureOrder:
    """Draws from the sources of a mixture in exact proportion to their weights.

    Positions are cut into blocks. After each block every source has been drawn from as often as its weight says,
    rounded to a whole number by largest remainders; within a block the sources are shuffled. Within a source every task
    comes once per epoch of that source.
    """

    def __init__(self, mixture: MixtureTasks, *, seed: int) -> None:
        """Raises `ValueError` for a weight so small that its source would hardly ever be drawn."""
        total = sum(map(Fraction, mixture.weights))
        self._shares = [Fraction(weight) / total for weight in mixture.weights]
        # A block has room for a draw of every source, so the rounded counts never go back.
        self._block = max(MIN_BLOCK, int(-(-1 // min(self._shares))))
        if self._block > MAX_BLOCK:
            name = mixture.names[self._shares.index(min(self._shares))]
            raise ValueError(
                f"{name}: its weight is less than a millionth of all weights; leave the source out"
            )
        self._mixture = mixture
        self._seed = seed
        self._orders = [
            ShuffledOrder(len(source), seed=_seed_of(seed, index))
            for index, source in enumerate(mixture.sources)
        ]
        self._contents = functools.lru_cache(maxsize=4)(self._make_block)

    def __getitem__(self, position: int, /) -> Draw:
        block, offset = divmod(position, self._block)
        sources, drawn_before = self._contents(block)
        source = int(sources[offset])
        draw = self._orders[source][int(drawn_before[offset])]
        return Draw(self._mixture.start(source) + draw.task_index, draw.epoch)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a block its source, and how often that source was drawn from before."""
        before, after = self._counts(block), self._counts(block + 1)
        sources = np.repeat(np.arange(len(before)), [b - a for a, b in zip(before, after, strict=True)])
        np.random.default_rng([self._seed, 0x6D6978, block]).shuffle(sources)
        drawn = np.empty(
            self._block, dtype=object
        )  # positions may go beyond 64 bits; they are Python's integers
        for source, count in enumerate(before):
            mine = np.flatnonzero(sources == source)
            drawn[mine] = [count + offset for offset in range(len(mine))]
        return sources, drawn

    def _counts(self, block: int) -> list[int]:
        """How often each source is drawn from in all blocks before this one: largest remainders."""
        quotas = [share * block * self._block for share in self._shares]
        counts = [int(quota) for quota in quotas]
        left = block * self._block - sum(counts)
        by_remainder = sorted(range(len(quotas)), key=lambda index: (counts[index] - quotas[index], index))
        for index in by_remainder[:left]:
            counts[index] += 1
        return counts


def permuted(index: int, size: int, key: str) -> int:
    """Where a keyed permutation of 0 <= i < size takes `index`, in constant memory.

    A Feistel network over the next even number of bits, walked until it comes back below `size` (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002): four steps at most on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(6):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest) & mask)
        index = left << half | right
        if index < size:
            return index


def _seed_of(seed: int, source: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:8])
