"""What an update came to: counted, and its checksums taken, as the tensors go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.trainer.weight_sync import SyncReport
from polyturn.trainer.weight_sync.buckets import size_of


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
