"""What stored episodes come to: rewards, outcomes, lengths, times and tools, over all and by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from polyturn.tools.types import ToolUsage

GROUPINGS = {
    "part": "part",
    "step": "step",
    "environment": "env_id",
    "task": "task_id",
    "group": "group_id",
    "outcome": "outcome",
    "reason": "stop_reason",
}
"""What episodes can be grouped by, and the column of it."""
COLUMNS = (
    "outcome",
    "stop_reason",
    "reward",
    "num_turns",
    "num_tool_calls",
    "num_tool_errors",
    "num_drawn_tokens",
    "total_s",
)
NUM_BINS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Quantiles of what is there; None where nothing is."""

    mean: float | None
    p50: float | None
    p95: float | None
    largest: float | None

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> Spread:
        if not values.size:
            return cls(mean=None, p50=None, p95=None, largest=None)
        middle, high = np.quantile(values, (0.5, 0.95))
        return cls(mean=float(values.mean()), p50=float(middle), p95=float(high), largest=float(values.max()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Values from `low` to `high`: the lower end included, and of the last bin the upper one, too."""

    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Some episodes. Failed ones have no reward, and are in no mean of one."""

    name: str
    num_episodes: int
    outcomes: dict[str, int]
    stop_reasons: dict[str, int]
    reward: Spread
    rewards: tuple[Bin, ...]
    turns: Spread
    tokens: Spread
    seconds: Spread
    num_tool_calls: int
    num_tool_errors: int


def summarize(table: pa.Table, name: str = "all") -> Summary:
    """The episodes of a table that has `COLUMNS`."""
    rewards = _numbers(table, "reward")
    return Summary(
        name=name,
        num_episodes=table.num_rows,
        outcomes=_counted(table["outcome"].to_pylist()),
        stop_reasons=_counted(table["stop_reason"].to_pylist()),
        reward=Spread.of(rewards),
        rewards=histogram(rewards),
        turns=Spread.of(_numbers(table, "num_turns")),
        tokens=Spread.of(_numbers(table, "num_drawn_tokens")),
        seconds=Spread.of(_numbers(table, "total_s")),
        num_tool_calls=int(_numbers(table, "num_tool_calls").sum()),
        num_tool_errors=int(_numbers(table, "num_tool_errors").sum()),
    )


def summarize_by(table: pa.Table, grouping: str) -> list[Summary]:
    """A summary for each value of one of `GROUPINGS`, in the order of the values."""
    column = table[GROUPINGS[grouping]].combine_chunks().dictionary_encode()
    if not table.num_rows:
        return []
    codes = column.indices.to_numpy(zero_copy_only=False)
    # Taken from many chunks, each row would be looked for.
    table = table.select(COLUMNS).combine_chunks()
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(column.dictionary) + 1))
    values = column.dictionary.to_pylist()
    found = [
        (value, table.take(pa.array(order[start:end])))
        for value, start, end in zip(values, starts[:-1], starts[1:], strict=True)
    ]
    return [summarize(of_one, str(value)) for value, of_one in sorted(found, key=lambda one: one[0])]


def histogram(values: npt.NDArray[np.float64], *, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Bins of equal width; where there are few different values, such as 0 and 1, one for each."""
    distinct = np.unique(values)
    if distinct.size <= num_bins:
        return tuple(
            Bin(low=float(value), high=float(value), count=int((values == value).sum())) for value in distinct
        )
    counts, edges = np.histogram(values, bins=num_bins)
    return tuple(
        Bin(low=float(low), high=float(high), count=int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )


def tool_usage(column: pa.ChunkedArray) -> dict[str, ToolUsage]:
    """What each tool was used for, summed over the column `tools`; the most called first."""
    found: dict[str, ToolUsage] = {}
    for chunk in column.chunks:
        # A row that is null has no entries, so that what stands between the offsets is all there is.
        start, end = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
        names = chunk.keys[start:end].dictionary_encode()
        codes = names.indices.to_numpy(zero_copy_only=False)
        usages = chunk.items[start:end]
        for code, name in enumerate(names.dictionary.to_pylist()):
            of_one = usages.filter(pa.array(codes == code))
            found[name] = found.get(name, ToolUsage()) + _summed(of_one)
    return dict(sorted(found.items(), key=lambda one: (-one[1].num_calls, one[0])))


def _summed(usages: pa.StructArray) -> ToolUsage:
    values = {field.name: usages.field(field.name) for field in fields(ToolUsage)}
    return ToolUsage(
        **{
            name: (pc.max if name.startswith("max_") else pc.sum)(column).as_py()
            for name, column in values.items()
        }
    )


def _numbers(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    return table[name].drop_null().to_numpy().astype(np.float64)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())
