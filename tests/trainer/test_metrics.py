"""Where a run's numbers go: what a reader finds there, also after a resume, and what a full disk does."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.layout_pb2 import Layout

from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.trainer.sinks.protocol import SinkStart
from polyturn.trainer.sinks.tensorboard import TensorBoardSink


def read_events(path: Path) -> Iterator[Event]:
    """The records of an event file: a length, its checksum, the event, its checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def write(run_dir: Path, *steps: int, last_step: int = 0) -> None:
    sink = TensorBoardSink()
    sink.open(SinkStart(run_dir=run_dir, config={}, last_step=last_step, history=list, tell=print))
    for step in steps:
        sink.write(step, {"reward/mean": step / 4, "train/loss": float("nan")})
    sink.close()


def test_tensorboard_is_given_every_finite_figure_and_where_a_resume_begins(tmp_path: Path) -> None:
    directory = tmp_path / "tensorboard"
    write(tmp_path, 1, 2, 3)
    (path,) = directory.iterdir()
    events = [event for event in read_events(path) if event.HasField("summary")]
    layout, *scalars = [(event.step, value) for event in events for value in event.summary.value]
    (text,) = layout[1].tensor.string_val
    charts = [chart for category in Layout.FromString(text).category for chart in category.chart]
    assert [chart.title for chart in charts] == [curve.title for curve in OVERVIEW]
    found = [(step, value.tag, value.simple_value) for step, value in scalars]
    assert found == [(step, "reward/mean", step / 4) for step in (1, 2, 3)]
    path.unlink()
    write(tmp_path, 3, last_step=2)
    (path,) = directory.iterdir()
    (start,) = [event for event in read_events(path) if event.HasField("session_log")]
    assert (start.step, start.session_log.status) == (3, SessionLog.START)


SCRIPT = """
import resource, signal, sys
from pathlib import Path
from polyturn.trainer.sinks.json_lines import JsonLinesSink
from polyturn.configs.metrics.overview import OVERVIEW
from polyturn.trainer.sinks.protocol import SinkStart
from polyturn.trainer.sinks.tensorboard import TensorBoardSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
place = Path(sys.argv[2])
if sys.argv[1] == "json":
    sink = JsonLinesSink(place / "metrics.jsonl", last_step=0)
else:
    sink = TensorBoardSink()
    sink.open(SinkStart(run_dir=place, config={}, last_step=0, history=list, tell=print))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
for step in range(200):
    try:
        sink.write(step, {f"name/{i}": 1.0 for i in range(20)})
    except OSError:
        print("told")
        break
"""


@pytest.mark.parametrize("kind", ["json", "tensorboard"])
def test_a_full_disk_is_told_by_whoever_writes(tmp_path: Path, kind: str) -> None:
    """No thread dies with a trace of its own, and nobody waits for one that has."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")
