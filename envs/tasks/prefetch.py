"""Tasks that are read in the background before they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from polyturn.envs.tasks.types import Task, TaskSource


class PrefetchedTasks:
    """A source whose tasks threads read ahead. A task that was not announced is read when it is asked for.

    The last `max_kept` tasks are kept: the episodes of a group ask for the same one. Close it at the end.
    """

    def __init__(self, source: TaskSource, *, num_workers: int = 2, max_kept: int = 4096) -> None:
        self.source = source
        self._max_kept = max_kept
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="tasks")
        self._lock = threading.Lock()
        self._read: OrderedDict[int, Future[Task]] = OrderedDict()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Task:
        """Waits for the task; raises what reading it raised."""
        return self._future(index).result()

    def prefetch(self, indices: Iterable[int]) -> None:
        """Begin to read these tasks; as many as are kept."""
        for _, index in zip(range(self._max_kept), indices, strict=False):
            self._future(index)

    def close(self) -> None:
        """End the threads; what was not begun is not read."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _future(self, index: int) -> Future[Task]:
        with self._lock:
            future = self._read.pop(index, None)
            if future is None:
                future = self._workers.submit(self.source.__getitem__, index)
            self._read[index] = future
            while len(self._read) > self._max_kept:
                self._read.popitem(last=False)
            return future
