"""The table of episodes: what passes a filter, in which order, and the page of it that is asked for.

Only the columns that a filter or an order needs are read of all episodes; whole rows only of those on the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from polyturn.viewer.episode_sets import EpisodeSet, EpisodeSets, StepPart
from polyturn.viewer.parameters import BadParameter, Parameters
from polyturn.viewer.plain_json import Json, finite
from polyturn.viewer.step_rows import MAPS

TITLES = {
    "step": "step",
    "episode_id": "episode",
    "group_id": "group",
    "env_id": "environment",
    "task_id": "task",
    "seed": "seed",
    "outcome": "outcome",
    "stop_reason": "stopped by",
    "error": "error",
    "reward": "reward",
    "advantage": "advantage",
    "num_turns": "turns",
    "num_tool_calls": "tool calls",
    "num_tool_errors": "tool errors",
    "num_drawn_tokens": "sampled tokens",
    "num_segments": "segments",
    "generate_s": "generating",
    "tools_s": "tools",
    "queue_s": "waiting",
    "total_s": "total",
    "parent_id": "branch of",
    "branch_turn": "from turn",
    "dropped": "left out",
}
HIDDEN = {"seed", "error", "num_segments", "generate_s", "tools_s", "queue_s", "parent_id", "branch_turn"}
TEXTS = {
    "episode_id",
    "group_id",
    "env_id",
    "task_id",
    "seed",
    "outcome",
    "stop_reason",
    "error",
    "parent_id",
    "dropped",
}
EQUAL = {
    "outcome": "outcome",
    "stop_reason": "stop_reason",
    "environment": "env_id",
    "task": "task_id",
    "group": "group_id",
}
"""Parameters that a column has to be equal to."""
MAX_ROWS = 1_000
MAX_NAMES = 200
"""Of metrics and reward parts that are columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Episodes that pass a filter, [n]."""

    parts: Sequence[StepPart]
    part: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]
    num_all: int

    def __len__(self) -> int:
        return len(self.part)

    def rewards(self) -> npt.NDArray[np.float64]:
        """NaN where there is none."""
        return self.numbers("reward")

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """A column of numbers, NaN where there is none."""
        return self._gather(lambda part: _numbers(part, name), np.float64)

    def texts(self, name: str) -> npt.NDArray[Any]:
        """A column of texts, "" where there is none."""
        return self._gather(lambda part: _texts(part, name), np.object_)

    def _gather(self, column: Any, kind: Any) -> npt.NDArray[Any]:
        found = np.empty(len(self), dtype=kind)
        for number in np.unique(self.part).tolist():
            here = self.part == number
            found[here] = column(self.parts[number])[self.place[here]]
        return found

    def places(self) -> list[tuple[StepPart, int]]:
        """Where each stands."""
        pairs = zip(self.part.tolist(), self.place.tolist(), strict=True)
        return [(self.parts[part], place) for part, place in pairs]

    def __getitem__(self, order: npt.NDArray[Any]) -> Selection:
        return Selection(
            parts=self.parts, part=self.part[order], place=self.place[order], num_all=self.num_all
        )


def episode_page(sets: EpisodeSets, parameters: Parameters) -> Json:
    """The answer to `/api/episodes`."""
    one = sets.find(parameters.text("set"))
    parts = parts_of(sets, one, parameters)
    selection = select(parts, parameters)
    sort = parameters.text("sort")
    if sort:
        selection = selection[order_by(selection, sort)]
    offset = parameters.integer("offset", 0)
    limit = parameters.integer("limit", 100, high=MAX_ROWS)
    page = selection[np.arange(min(offset, len(selection)), min(offset + limit, len(selection)))]
    rows = rows_of(page, one.name)
    if (version := parameters.maybe_integer("version")) is not None:
        rows = [{**row, **_versions(page, index, version)} for index, row in enumerate(rows)]
    return {
        "columns": _columns(parts, rows),
        "rows": rows,
        "num_matching": len(selection),
        "num_all": selection.num_all,
        "histogram": histogram(selection.rewards(), num_bins=20),
        "problems": problems_of(parts),
    }


def parts_of(sets: EpisodeSets, one: EpisodeSet, parameters: Parameters) -> list[StepPart]:
    """The parts of the steps that the parameters ask for."""
    step = parameters.maybe_integer("step")
    first = step if step is not None else parameters.integer("from_step", 0)
    last = step if step is not None else parameters.integer("to_step", 2**53)
    return [part for number in one.steps if first <= number <= last for part in sets.parts(one, number)]


def problems_of(parts: Iterable[StepPart]) -> list[str]:
    """What is damaged, each sentence once, and no more than twenty."""
    return list(dict.fromkeys(sentence for part in parts for sentence in part.rows.problems))[:20]


def select(parts: Sequence[StepPart], parameters: Parameters) -> Selection:
    """The episodes that pass the filter, in the order in which they were written."""
    masks = [_mask(part, parameters) for part in parts]
    places = [np.flatnonzero(mask) for mask in masks]
    none = np.zeros(0, dtype=np.int64)
    return Selection(
        parts=parts,
        part=np.concatenate([none, *(np.full(len(found), number) for number, found in enumerate(places))]),
        place=np.concatenate([none, *places]),
        num_all=sum(len(mask) for mask in masks),
    )


def _mask(part: StepPart, parameters: Parameters) -> npt.NDArray[np.bool_]:
    mask = np.ones(len(part.rows), dtype=np.bool_)
    low, high = parameters.maybe_number("min_reward"), parameters.maybe_number("max_reward")
    tool_error = parameters.maybe_flag("tool_error")
    dropped = parameters.maybe_flag("dropped")
    equal = {column: value for name, column in EQUAL.items() if (value := parameters.text(name)) is not None}
    if low is not None or high is not None:
        rewards = _numbers(part, "reward")
        with np.errstate(invalid="ignore"):
            mask &= (rewards >= (-np.inf if low is None else low)) & (
                rewards <= (np.inf if high is None else high)
            )
    for column, value in equal.items():
        mask &= _equals(part.rows.column(column), value)
    if tool_error is not None:
        mask &= (_numbers(part, "num_tool_errors") > 0) == tool_error
    if dropped is not None:
        mask &= np.array(
            [(part.why_dropped(i) is not None) == dropped for i in range(len(mask))], dtype=np.bool_
        )
    version = parameters.maybe_integer("version")
    if version is not None and mask.any():
        mask &= part.rows.has_version(version)
    text = parameters.text("text")
    if text and mask.any():
        mask &= _contains(part.rows.column("messages"), text)
    return mask


def _equals(column: pa.Array, value: str) -> npt.NDArray[np.bool_]:
    found = pc.fill_null(pc.equal(column, pa.scalar(value, column.type)), False)
    return found.to_numpy(zero_copy_only=False)


def _contains(messages: pa.Array, text: str) -> npt.NDArray[np.bool_]:
    """Whether the text stands in any of the messages, which are JSON, whatever the case."""
    escaped = orjson.dumps(text).decode()[1:-1]
    found = pc.fill_null(pc.match_substring(messages, escaped, ignore_case=True), False)
    return found.to_numpy(zero_copy_only=False)


def _numbers(part: StepPart, name: str) -> npt.NDArray[np.float64]:
    if name == "step":
        return np.full(len(part.rows), part.step, dtype=np.float64)
    map_name, _, key = name.partition(".")
    if map_name in MAPS and key:
        column = pc.map_lookup(part.rows.column(map_name), pa.scalar(key), "first")
    else:
        column = part.rows.column(name)
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _texts(part: StepPart, name: str) -> npt.NDArray[Any]:
    if name == "dropped":
        found = [part.why_dropped(place) or "" for place in range(len(part.rows))]
    else:
        found = ["" if value is None else str(value) for value in part.rows.column(name).to_pylist()]
    texts = np.empty(len(found), dtype=np.object_)
    texts[:] = found
    return texts


def order_by(selection: Selection, sort: str) -> npt.NDArray[np.int64]:
    """The order of a column, `-` before it for the largest first; what has no value comes last."""
    name, is_descending = sort.removeprefix("-"), sort.startswith("-")
    if name.partition(".")[0] not in MAPS and name not in TITLES:
        raise BadParameter(f"sort: there is no column {name[:200]!r}")
    if name in MAPS:
        raise BadParameter(f"sort: name one of {name}, as {name}.NAME")
    if name in TEXTS and name != "seed":
        ranks = np.unique(selection.texts(name).astype(str), return_inverse=True)[1].astype(np.float64)
    else:
        ranks = selection.numbers(name)
    order: npt.NDArray[np.int64] = np.argsort(-ranks if is_descending else ranks, kind="stable")
    return order


def rows_of(selection: Selection, set_name: str) -> list[Json]:
    """Whole rows, as `EpisodeRow` has them."""
    rows: list[Json] = [{}] * len(selection)
    for number in np.unique(selection.part).tolist():
        part = selection.parts[number]
        where = np.flatnonzero(selection.part == number)
        places = selection.place[where].tolist()
        for index, place, row in zip(where.tolist(), places, part.rows.rows(places), strict=True):
            rows[index] = episode_row(row, set_name, part.step, part.why_dropped(place))
    return rows


def episode_row(row: Json, set_name: str, step: int, dropped: str | None) -> Json:
    """A row of the store as `EpisodeRow` has it."""
    made = {
        **row,
        "set": set_name,
        "step": step,
        "seed": str(row["seed"]),
        "error": (row["error"] or "").partition("\n")[0][:2_000] or None,
        "dropped": dropped,
        "min_version": None,
        "max_version": None,
    }
    for name in ("reward", "advantage", "generate_s", "tools_s", "queue_s", "total_s"):
        made[name] = finite(row[name])
    for name in MAPS:
        made[name] = {key: finite(value) for key, value in (row[name] or [])[:MAX_NAMES]}
    return made


def _versions(page: Selection, index: int, asked: int) -> Json:
    part, place = page.places()[index]
    episode = part.rows.episode(place)
    if episode is None:
        return {"min_version": asked, "max_version": asked}
    return version_range([segment.policy_versions[segment.sampled] for segment in episode.segments])


def version_range(versions: Sequence[npt.NDArray[np.int32]]) -> Json:
    """`min_version` and `max_version` of sampled tokens."""
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *versions])
    if not len(flat):
        return {"min_version": None, "max_version": None}
    return {"min_version": int(flat.min()), "max_version": int(flat.max())}


def _columns(parts: Sequence[StepPart], rows: Sequence[Json]) -> list[Json]:
    """Those that every row has, and the names in the maps of the page and of the first rows of all parts."""
    found: dict[str, dict[str, None]] = {name: {} for name in MAPS}
    firsts = [part for part in parts if len(part.rows)]
    for row in [*rows, *(part.rows.rows([0])[0] for part in firsts[:: max(1, len(firsts) // 8)])]:
        for name in MAPS:
            found[name] |= dict.fromkeys(dict(row[name] or {}))
    columns = [_column(name, title, is_shown=name not in HIDDEN) for name, title in TITLES.items()]
    for name, keys in found.items():
        for key in sorted(keys)[:MAX_NAMES]:
            columns.append(_column(f"{name}.{key}", key, is_shown=len(keys) <= 6))
    return columns


def _column(name: str, title: str, *, is_shown: bool) -> Json:
    kind = "text" if name in TEXTS else "seconds" if name.endswith("_s") else "number"
    return {"name": name, "title": title, "kind": kind, "is_shown": is_shown}


def histogram(rewards: npt.NDArray[np.float64], *, num_bins: int) -> Json:
    """Counts of the rewards; few different ones have a bin each."""
    there = rewards[np.isfinite(rewards)]
    if not len(there):
        return {"edges": [], "counts": [], "num_without": len(rewards)}
    low, high = float(there.min()), float(there.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(there, bins=num_bins, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist(), "num_without": len(rewards) - len(there)}
