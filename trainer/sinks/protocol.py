"""What takes the rows of a run, and what it is told when it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyturn.envs.plugins import Signature

Row = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkStart:
    """What a sink begins with."""

    run_dir: Path
    config: Mapping[str, Any]
    """The resolved config as JSON values. There is no secret in it."""
    last_step: int
    """The step after which the run goes on; rows behind it that were written before are to be taken back, or hidden.
    0: it begins."""
    history: Callable[[], Sequence[tuple[int, Row]]]
    """The rows up to that step, for a sink that begins anew; figures that were not finite are missing in them."""
    tell: Callable[[str], None]
    """Shows a person a line."""

    @property
    def name(self) -> str:
        """Of the run, one for each."""
        return self.run_dir.name


class MetricSink(Protocol):
    """Takes one row of figures a step. All three are called by one thread; what they raise is told once, and costs the
    row. Figures may be NaN or infinite."""

    def open(self, start: SinkStart) -> None: ...

    def write(self, step: int, values: Row) -> None: ...

    def close(self) -> None: ...


METHODS = {
    name: Signature(what="metric sink", arguments=arguments, text=text, wrong_results=())
    for name, arguments, text in (
        ("open", ("start",), "def open(self, start: SinkStart) -> None"),
        ("write", ("step", "values"), "def write(self, step: int, values: Mapping[str, float]) -> None"),
        ("close", (), "def close(self) -> None"),
    )
}
"""Of a sink of one's own."""
