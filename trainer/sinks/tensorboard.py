"""TensorBoard events."""

from __future__ import annotations

import math
import time
from pathlib import Path

from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.trainer.sinks.protocol import Row, SinkStart


class TensorBoardSink:
    """Event files in `tensorboard/`; a resumed run hides the steps that it plays again.

    The package's own summary writer has a thread, which a full disk ends: whoever writes after that waits for ever.
    Its files are written here directly, so that the fault reaches the caller. Figures that are not finite are left out,
    as curves end at one.
    """

    def open(self, start: SinkStart) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import custom_scalars

        directory = start.run_dir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(_unused(directory)))
        if start.last_step:
            begin = SessionLog(status=SessionLog.START)
            self._writer.write_event(
                Event(wall_time=time.time(), step=start.last_step + 1, session_log=begin)
            )
        layout = {
            "Overview": {curve.title: ["Multiline", [_tag(n) for n in curve.names]] for curve in OVERVIEW}
        }
        self._writer.write_event(Event(wall_time=time.time(), summary=custom_scalars(layout)))

    def write(self, step: int, values: Row) -> None:
        """Raises `OSError` where the disk is full."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if math.isfinite(value):
                self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tag(name: str) -> str:
    """A metric's name, with `*` in it, as the regular expression of tags that a chart shows."""
    return f"^{name.replace('*', '[^/]+')}$"


def _unused(directory: Path) -> Path:
    """The beginning of an event file's name that no other session in this second has."""
    return directory / f"events-{time.time_ns()}"
