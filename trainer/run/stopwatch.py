"""Where the seconds of a run go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stopwatch:
    """Seconds by phase: generating, tools, training and so on; and since it was made."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    on_span: Callable[[str, float, float], None] | None = None
    """Told of everything that is measured: its name, when it began and when it ended, by `time.perf_counter`."""

    @property
    def total(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def measure(self, phase: str, *, span: str = "") -> Iterator[None]:
        """Add what the block takes to a phase; `span` is what a timeline calls it, if not that."""
        started = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            self.add(phase, ended - started)
            if self.on_span is not None:
                self.on_span(span or phase, started, ended)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
