"""torch's profiler on a rank, from one call of it to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polyturn.configs.schema.trainer import ProfileConfig

if TYPE_CHECKING:
    from torch.profiler import profile


def trace_path(directory: Path, step: int, rank: int) -> Path:
    """Where the trace of a step is written."""
    return directory / f"step_{step:06d}_rank_{rank}.json.gz"


class RankProfiler:
    """Records what a rank does between `begin` and `end`."""

    def __init__(self, config: ProfileConfig, *, rank: int, device: str) -> None:
        self._config = config
        self._rank = rank
        self._is_on_gpu = device == "cuda"
        self._running: profile | None = None

    def begin(self) -> None:
        """Begin to record, on the ranks that the config names."""
        if self._rank not in self._config.ranks:
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [
            ProfilerActivity.CUDA if name == "cuda" else ProfilerActivity.CPU
            for name in self._config.activities
            if name == "cpu" or self._is_on_gpu
        ]
        self._running = profile(
            activities=activities or [ProfilerActivity.CPU],
            record_shapes=self._config.record_shapes,
            profile_memory=self._config.profile_memory,
            with_stack=self._config.with_stack,
        )
        self._running.start()

    def end(self, directory: Path, step: int) -> None:
        """Write what was recorded since; nothing where `begin` recorded nothing."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()
        directory.mkdir(exist_ok=True)
        running.export_chrome_trace(str(trace_path(directory, step, self._rank)))
