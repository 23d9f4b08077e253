"""Tasks that are read in the background before they are needed."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.tasks.types import Task, TaskSource
from polyturn.tools.threads import PinnedThread, Returned


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
