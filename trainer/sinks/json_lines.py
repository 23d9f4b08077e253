"""`metrics.jsonl`: one JSON object a line, which every run has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import orjson

from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.sinks.protocol import Row


class JsonLinesSink:
    """Writes where the run waits for it, as all others can be made of this file. On resume, rows of steps that no
    checkpoint kept are dropped."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= last_step]
            with whole_file(path) as file:
                file.write(b"".join(orjson.dumps(row) + b"\n" for row in kept))
        self._file = path.open("ab")

    def write(self, step: int, values: Row) -> None:
        """Raises `OSError` where the disk is full."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(orjson.dumps({"step": step, **finite}) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; what is no row, such as a last line that a crash cut short, is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        row = _row(line) if line.endswith(b"\n") else None
        if row is not None:
            rows.append(row)
    return rows


def finite_rows(path: Path, *, last_step: int | None = None) -> list[tuple[int, dict[str, float]]]:
    """The same as steps and figures without those that were not finite; up to a step, where one is given."""
    return [
        (row["step"], {name: value for name, value in row.items() if name != "step" and value is not None})
        for row in read_metrics(path)
        if last_step is None or row["step"] <= last_step
    ]


def num_damaged_rows(path: Path) -> int:
    """How many whole lines of a `metrics.jsonl` are no rows; 0 where there is none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return sum(line.endswith(b"\n") and _row(line) is None for line in lines)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
