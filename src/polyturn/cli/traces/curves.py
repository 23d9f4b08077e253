"""The curves of the overview as a table, where a directory has a run's figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from polyturn.cli.traces.paper import Paper, columns, one_line
from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.trainer.sinks.json_lines import finite_rows

BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 30
NAME_WIDTH = 40


def overview_of(directory: Path) -> dict[str, dict[int, float]]:
    """Each metric of the overview that a run has, in the overview's order, by step; none where there is no run."""
    path = directory / "metrics.jsonl"
    rows = finite_rows(path) if path.exists() else []
    known = sorted({name for _, row in rows for name in row})
    names = [name for curve in OVERVIEW for name in curve.names_in(known)]
    return {name: {step: row[name] for step, row in rows if name in row} for name in names}


def overview_lines(overview: Mapping[str, Mapping[int, float]], paper: Paper) -> Iterator[str]:
    """A metric a line: its first and its last value, the extremes, and its course."""
    if not overview:
        return
    yield f"\n{paper.ink('over the steps', bold=True)}"
    rows: list[tuple[str, ...]] = [("metric", "first", "last", "lowest", "highest", "")]
    for name, by_step in overview.items():
        values = list(by_step.values())
        shown = (values[0], values[-1], min(values), max(values))
        rows.append((one_line(name, NAME_WIDTH), *(f"{value:.4g}" for value in shown), course(values)))
    yield from columns(rows, right=range(1, 5))


def course(values: Sequence[float]) -> str:
    """A bar for each value, or for the mean of several, from the lowest to the highest."""
    size = -(-len(values) // MOST_BARS)
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    low, high = min(means), max(means)
    spread = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / spread * (len(BARS) - 1))] for mean in means)
