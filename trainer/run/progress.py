"""Where a run's figures go: to a person, live on a terminal or one plain line per step elsewhere; to `metrics.jsonl`
always, and to TensorBoard beside it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from polyturn.rollout.whole_file import whole_file
from polyturn.tools.plain import printable

NUM_ROWS_SHOWN = 12


class ProgressDisplay(Protocol):
    """Shows the phases and the finished steps of a run."""

    def phase(self, name: str, *, total: int | None = None) -> None:
        """A phase begins; `total` counts the units of it, where they are known."""
        ...

    def advance(self) -> None:
        """One unit of the phase is done."""
        ...

    def step(self, step: int, row: Mapping[str, float]) -> None:
        """A step is finished."""
        ...

    def message(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None: ...


def make_progress(kind: Literal["auto", "bar", "plain"], *, num_steps: int) -> ProgressDisplay:
    """The display that suits the terminal, or the one that was asked for."""
    live = kind == "bar" or (kind == "auto" and sys.stdout.isatty())
    return LiveProgress(num_steps=num_steps) if live else PlainProgress(num_steps=num_steps)


def format_step(step: int, num_steps: int, row: Mapping[str, float]) -> str:
    """One line about a step: reward, success, turns, speed, and where the seconds went."""
    seconds = {part: row.get(f"seconds/{part}", 0.0) for part in ("generate", "tools", "train", "sync")}
    split = " ".join(f"{part} {value:.1f}" for part, value in seconds.items())
    if seconds["sync"]:
        split += f", engines paused {row.get('sync/pause_seconds', 0.0):.2f}"
    end = f"{row['seconds/step']:.1f} s ({split})"
    if not row["episode/num"]:
        return f"step {step:>3}/{num_steps}  nothing to train on  {end}"
    return (
        f"step {step:>3}/{num_steps}  reward {row['reward/mean']:.3f}  success {row['success/mean']:.3f}  "
        f"turns {row['episode/turns']:.2f}  {row['rollout/tokens_per_second']:.0f} tok/s  {end}"
    )


class PlainProgress:
    """One line per phase and per step."""

    def __init__(self, *, num_steps: int, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._stream = stream or sys.stdout
        self._started = time.monotonic()

    def phase(self, name: str, *, total: int | None = None) -> None:
        if not name.startswith("step"):
            self.message(f"{name} …" if total is None else f"{name} ({total}) …")

    def advance(self) -> None:
        """Units within a phase are not shown line by line."""

    def step(self, step: int, row: Mapping[str, float]) -> None:
        self.message(format_step(step, self._num_steps, row))

    def message(self, text: str) -> None:
        shown = f"[{time.monotonic() - self._started:6.1f} s] {printable(text)}"
        print(shown, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class LiveProgress:
    """A table of the last steps above two bars: the run's steps and the phase under way."""

    def __init__(self, *, num_steps: int) -> None:
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._bars = Progress(
            TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._steps: TaskID = self._bars.add_task("steps", total=num_steps)
        self._phase: TaskID = self._bars.add_task("starting", total=None)
        self._live = Live(self._render(), console=Console(), refresh_per_second=4, transient=False)
        self._live.start()

    def phase(self, name: str, *, total: int | None = None) -> None:
        self._bars.reset(self._phase, description=name, total=total, completed=0)

    def advance(self) -> None:
        self._bars.advance(self._phase)

    def step(self, step: int, row: Mapping[str, float]) -> None:
        self._rows = [*self._rows, (step, row)][-NUM_ROWS_SHOWN:]
        self._bars.update(self._steps, completed=step)
        self._live.update(self._render())

    def message(self, text: str) -> None:
        # Not as Rich's markup: what failed may have brackets in its words.
        self._live.console.print(printable(text), markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        table = Table(
            "step", "reward", "success", "turns", "tok/s", "generate", "tools", "train", "sync", box=None
        )
        for step, row in self._rows:
            table.add_row(
                str(step),
                f"{row['reward/mean']:.3f}",
                f"{row['success/mean']:.3f}",
                f"{row['episode/turns']:.2f}",
                f"{row['rollout/tokens_per_second']:.0f}",
                *(
                    f"{row.get(f'seconds/{part}', 0.0):.1f} s"
                    for part in ("generate", "tools", "train", "sync")
                ),
            )
        return Group(table, self._bars)


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
