"""Where a run's numbers go: `metrics.jsonl` always, TensorBoard beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from polyturn.rollout.whole_file import whole_file


class MetricSink(Protocol):
    """Takes one row of scalars per step."""

    def write(self, step: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLinesSink:
    """One JSON object a line. On resume, rows of steps that no checkpoint kept are dropped."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        self._path = path
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= last_step]
            with whole_file(path) as file:
                file.write(b"".join(orjson.dumps(row) + b"\n" for row in kept))
        self._file = path.open("ab")

    def write(self, step: int, row: Mapping[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(orjson.dumps({"step": step, **finite}) + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard events; a resumed run hides the steps that it plays again.

    The package's own summary writer has a thread, which a full disk ends: whoever writes after that waits for ever.
    Its files are written here directly, so that the fault reaches the caller.
    """

    def __init__(self, directory: Path, *, last_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        if last_step:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=last_step + 1, session_log=start))

    def write(self, step: int, row: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for key, value in row.items():
            if math.isfinite(value):
                event = Event(wall_time=time.time(), step=step, summary=scalar(key, value))
                self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; what is no row, such as a last line that a crash cut short, is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        row = _row(line) if line.endswith(b"\n") else None
        if row is not None:
            rows.append(row)
    return rows


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
