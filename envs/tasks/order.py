"""How a run goes through a source of tasks: in which order, read ahead of use, and known from another source.

Which task stands at a position, and of which epoch, follows from the position and the seed, without what came before.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

import numpy as np

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import Task, TaskSource
from polyturn.envs.tasks.sources import MixtureTasks
from polyturn.tools.threads import PinnedThread, Returned

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


class PrefetchedTasks:
    """A source whose tasks threads read ahead. A task that was not announced is read when it is asked for.

    The last `max_kept` tasks are kept: the episodes of a group ask for the same one. What could not be read is not.
    Close it at the end.
    """

    def __init__(self, source: TaskSource, *, num_workers: int = 2, max_kept: int = 4096) -> None:
        self.source = source
        self._max_kept = max_kept
        self._workers = itertools.cycle([PinnedThread("tasks") for _ in range(num_workers)])
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._read: OrderedDict[int, Future[Returned]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Task:
        """Waits for the task; raises what reading it raised."""
        return self._value(index, self._future(index).result())

    async def read(self, index: int, *, timeout_s: float | None = None) -> Task:
        """Awaits the task; raises what reading it raised, and `EnvironmentFault` where that takes too long."""
        reading = asyncio.wrap_future(self._future(index))
        try:
            async with asyncio.timeout(timeout_s):
                returned = await asyncio.shield(reading)
        except TimeoutError:
            raise EnvironmentFault(f"task {index} could not be read within {timeout_s:g} s") from None
        return self._value(index, returned)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Begin to read these tasks; as many as are kept."""
        for _, index in zip(range(self._max_kept), indices, strict=False):
            self._future(index)

    def close(self) -> None:
        """End the threads; what was not begun is not read."""
        with self._lock:
            for future in self._read.values():
                future.cancel()
        for worker in itertools.islice(self._workers, self._num_workers):
            worker.shutdown()

    def _value(self, index: int, returned: Returned) -> Task:
        if returned.error is not None:
            with self._lock:
                self._read.pop(index, None)
        task: Task = returned.get()
        return task

    def _future(self, index: int) -> Future[Returned]:
        with self._lock:
            future = self._read.pop(index, None)
            if future is None:
                reading = partial(self.source.__getitem__, index)
                future = next(self._workers).submit(Returned.of, reading)
            self._read[index] = future
            while len(self._read) > self._max_kept:
                self._read.popitem(last=False)
            return future


MAX_TASKS = 1024
"""A source of more tasks than this is digested by so many of them, evenly spread, and by their number."""
MAX_GENERATED = 64
"""The same of one that makes its tasks without end, which may take a while for each."""


def task_digest(task: Task) -> str:
    """64 bits of SHA-256, in hexadecimal, over what the task says: the same in every process and session."""
    said = (task.task_id, task.messages, task.label, task.metadata, task.environment)
    return hashlib.sha256(_canonical(said)).hexdigest()[:16]


def source_digest(source: TaskSource) -> str:
    """The same of a source: of its length and its tasks in their order."""
    num_tasks = len(source)
    found = hashlib.sha256(str(num_tasks).encode())
    most = MAX_GENERATED if getattr(source, "is_endless", False) else MAX_TASKS
    num_looked_at = min(num_tasks, most)
    for place in range(num_looked_at):
        index = place * (num_tasks - 1) // max(num_looked_at - 1, 1)
        found.update(task_digest(source[index]).encode())
    return found.hexdigest()[:16]


def _canonical(value: Any) -> bytes:
    """Any value as bytes: the same for equal contents, whatever the order of a mapping, and never an address."""
    match value:
        case str():
            return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
        case bytes() | bytearray():
            return _tagged(b"b", bytes(value))
        case None | bool() | float():
            return _tagged(b"v", repr(value).encode())
        case int():
            return _tagged(b"i", hex(value).encode())
        case np.ndarray() | np.generic():
            return _canonical(value.tolist())
        case Mapping():
            return _tagged(b"m", *sorted(_canonical(key) + _canonical(value[key]) for key in value))
        case Set():
            return _tagged(b"t", *sorted(map(_canonical, value)))
        case Sequence():
            return _tagged(b"l", *map(_canonical, value))
    if is_dataclass(value):
        return _tagged(b"d", *(_canonical(getattr(value, field.name)) for field in fields(value)))
    return _tagged(b"o", f"{type(value).__module__}.{type(value).__qualname__}".encode())


def _tagged(tag: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return b"%b%d:%b" % (tag, len(content), content)
