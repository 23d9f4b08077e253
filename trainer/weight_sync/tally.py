"""What an update came to: counted, and its checksums taken, as the tensors go by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.tools.closing import Closing
from polyturn.trainer.weight_sync import SyncReport
from polyturn.trainer.weight_sync.buckets import Bucket, size_of


class Tally:
    """Of one update."""

    def __init__(self, new_checksums: Callable[[], EngineChecksums] | None) -> None:
        """None: nobody compares checksums, and none are taken."""
        self._checksums = None if new_checksums is None else new_checksums()
        self._num_tensors = self._num_bytes = 0

    def add_all(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Count some that are sent."""
        for name, tensor in named_tensors:
            self.add(name, tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Count a tensor that is sent, whole."""
        self._num_tensors += 1
        self._num_bytes += size_of(tensor)
        if self._checksums is not None:
            self._checksums.add(name, tensor)

    def report(
        self, *, version: int, seconds: float, pause_seconds: float, num_bytes: int | None = None
    ) -> SyncReport:
        """Once all have been added; `num_bytes`: of what went over the wire, if not of the tensors."""
        return SyncReport(
            version=version,
            num_tensors=self._num_tensors,
            num_bytes=self._num_bytes if num_bytes is None else num_bytes,
            seconds=seconds,
            pause_seconds=pause_seconds,
            checksums={} if self._checksums is None else self._checksums.finish(),
        )


class TallyBeside(Closing):
    """Takes a tally in a thread of its own, while the tensors go to the engines. A context manager."""

    def __init__(self, tally: Tally, *, held_bytes: int) -> None:
        """`held_bytes`: of tensors, beside the newest bucket's, that may wait to be counted."""
        self._tally = tally
        self._limit = held_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksums")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._held_bytes = 0

    def close(self) -> None:
        """Wait for what is being counted; what only waits is given up."""
        self._thread.shutdown(cancel_futures=True)

    def add(self, bucket: Bucket) -> None:
        """Count a bucket; waits while too much is held of those before."""
        num_bytes = sum(size_of(tensor) for _, tensor in bucket)
        while self._waiting and (self._waiting[0][0].done() or self._held_bytes > self._limit):
            self._take()
        self._waiting.append((self._thread.submit(self._tally.add_all, bucket), num_bytes))
        self._held_bytes += num_bytes

    def finish(self) -> None:
        """Wait until all are counted."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        counted, num_bytes = self._waiting.popleft()
        counted.result()
        self._held_bytes -= num_bytes
