"""What a curriculum has drawn, on disk as it draws, so that a run that crashed plays on at the tasks that it began."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from polyturn.envs.tasks.order import Draw


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedDraw:
    """One draw that a crash must not change."""

    draw: Draw
    num_sampled: int
    """Draws of the sampler up to it, with those that the gate passed over."""


class DrawLog:
    """A line of JSON for each draw, in the order of positions: position, task, epoch, draws of the sampler so far."""

    def __init__(self, path: Path, *, position: int) -> None:
        """Read what was drawn from a position on, and keep that alone; a line that a crash cut short is dropped."""
        self._found: dict[int, LoggedDraw] = {}
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                place, task_index, epoch, num_sampled = map(int, orjson.loads(line))
            except (ValueError, TypeError):
                break
            if place >= position and line.endswith(b"\n"):
                self._found[place] = LoggedDraw(draw=Draw(task_index, epoch), num_sampled=num_sampled)
        written = path.with_suffix(".part")
        written.write_bytes(b"".join(_line(place, drawn) for place, drawn in self._found.items()))
        os.replace(written, path)
        self._file: BinaryIO = path.open("ab")

    def take(self, position: int) -> LoggedDraw | None:
        """What was drawn at a position before the crash; None: nothing was."""
        return self._found.pop(position, None)

    def append(self, position: int, drawn: LoggedDraw) -> None:
        """Keep a draw. It is with the operating system when this returns."""
        self._file.write(_line(position, drawn))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(position: int, drawn: LoggedDraw) -> bytes:
    return orjson.dumps([position, drawn.draw.task_index, drawn.draw.epoch, drawn.num_sampled]) + b"\n"
