"""Sinks: what the real packages hold afterwards, also over a resume, and that none of them can trouble a run."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.metrics import MetricsConfig, PrometheusMetrics
from polyturn.trainer.sinks.background import BackgroundSink
from polyturn.trainer.sinks.factory import RunSinks, check_sinks
from polyturn.trainer.sinks.json_lines import JsonLinesSink, finite_rows, read_metrics
from polyturn.trainer.sinks.prometheus import PrometheusSink
from polyturn.trainer.sinks.protocol import Row, SinkStart


def start_at(run_dir: Path, *, last_step: int = 0, tell: Callable[[str], None] = print) -> SinkStart:
    return SinkStart(
        run_dir=run_dir,
        config={"seed": 3},
        last_step=last_step,
        history=lambda: finite_rows(run_dir / "metrics.jsonl", last_step=last_step),
        tell=tell,
    )


SESSIONS = """
import json, math, sys
from pathlib import Path
from polyturn.configs.schema.metrics import MetricsConfig
from polyturn.trainer.sinks.factory import RunSinks
from polyturn.trainer.sinks.json_lines import JsonLinesSink
from tests.trainer.test_sinks import start_at
run_dir, config = Path(sys.argv[1]), MetricsConfig.model_validate(json.loads(sys.argv[2]))
# The session goes on after a step, and writes up to another one.
for session, (last_step, end) in enumerate([(0, 4), (2, 3), (3, 4)]):
    file = JsonLinesSink(run_dir / "metrics.jsonl", last_step=last_step)
    sinks = RunSinks(config, start_at(run_dir, last_step=last_step), file)
    for step in range(last_step + 1, end + 1):
        sinks.write(step, {"reward/mean": session + step / 8, "train/loss": math.nan, "train/grad_norm": math.inf})
    sinks.close()
"""
BLOCK = 32_768
"""Of LevelDB's logs: no record's head crosses the end of one."""
WHOLE = [(1, 0.125), (2, 0.25), (3, 1.375), (4, 2.5)]
"""The steps and rewards of a run that was resumed twice, each step as it was taken last."""


def play_sessions(run_dir: Path, sink: dict[str, Any], **variables: str) -> None:
    run_dir.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS, str(run_dir), json.dumps({"sinks": [sink]})],
        env={**os.environ, **variables},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "warning" not in done.stdout + done.stderr, done.stdout + done.stderr
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [(row["step"], row["reward/mean"]) for row in rows] == WHOLE
    assert {row["train/loss"] for row in rows} == {row["train/grad_norm"] for row in rows} == {None}


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, which is a log of LevelDB behind a header of its own."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_holds_each_step_once_and_no_key(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    secret = "0123456789abcdef" * 3
    sink = {"kind": "wandb", "mode": "offline", "api_key_file": "env:KEY_OF_THE_TEST"}
    play_sessions(tmp_path / "run", sink, KEY_OF_THE_TEST=secret, HOME=str(tmp_path))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(tmp_path.rglob("*.wandb")):
        name = ""
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                name = record.run.display_name
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                runs.setdefault(name, []).append(items | {"step": record.history.step.num})
    assert [row["step"] for row in runs["run"]] == [1, 2, 3, 4]
    assert [(row["step"], row["reward/mean"]) for row in runs["run-2"]] == WHOLE
    for row in runs["run-2"]:
        assert row["overview/reward/mean"] == row["reward/mean"]
    assert {str(row["train/loss"]) for row in runs["run"]} <= {"NaN", "nan"}


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_holds_each_step_once(tmp_path: Path) -> None:
    play_sessions(tmp_path / "run", {"kind": "trackio"}, TRACKIO_DIR=str(tmp_path / "trackio"))
    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as storage;"
        "print(json.dumps({name: storage.get_logs('polyturn', name) for name in storage.get_runs('polyturn')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", read],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        check=True,
    )
    runs = json.loads(done.stdout.splitlines()[-1])
    assert [row["step"] for row in runs["run"]] == [1, 2, 3, 4]
    assert [(row["step"], row["reward/mean"]) for row in runs["run-2"]] == WHOLE
    for row in runs["run"]:
        assert row["overview/reward/mean"] == row["reward/mean"]
        assert math.isnan(float(row["train/loss"])) and math.isinf(float(row["train/grad_norm"]))


def test_prometheus_scrapes_the_newest_row(tmp_path: Path) -> None:
    told: list[str] = []
    sink = PrometheusSink(PrometheusMetrics(kind="prometheus", port=0))
    sink.open(start_at(tmp_path / "run", tell=told.append))
    sink.write(1, {"reward/mean": 0.25, "engine/1/requests": 9.0})
    figures = {"reward/mean": 0.5, "engine/requests": 7.0, "engine/0/requests": 3.0, "train/loss": math.nan}
    sink.write(2, figures | {"environment/a/b/reward/mean": -math.inf, "mine/own": 1.0})
    url = told[0].rpartition(" ")[2]
    assert url.startswith("http://127.0.0.1:")
    lines = httpx.get(url, trust_env=False).text.splitlines()
    assert {line for line in lines if not line.startswith("#")} == {
        'polyturn_step{part="",run="run"} 2.0',
        'polyturn_reward_mean{part="",run="run"} 0.5',
        'polyturn_reward_mean{part="a/b",run="run"} -Inf',
        'polyturn_engine_requests{part="",run="run"} 7.0',
        'polyturn_engine_requests{part="0",run="run"} 3.0',
        'polyturn_train_loss{part="",run="run"} NaN',
        'polyturn_mine_own{part="",run="run"} 1.0',
    }
    assert "# HELP polyturn_reward_mean mean reward of the step's episodes (reward)" in lines
    sink.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


class Hanging:
    """Takes a row for as long as it is told."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.begun = threading.Event()
        self.steps: list[int] = []

    def open(self, start: SinkStart) -> None:
        """Nothing to do."""

    def write(self, step: int, values: Row) -> None:
        self.begun.set()
        self.released.wait()
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


def test_a_sink_that_hangs_is_left_behind_and_what_it_lacks_is_counted(tmp_path: Path) -> None:
    told: list[str] = []
    hanging = Hanging()
    sink = BackgroundSink(
        "mine", hanging, start_at(tmp_path, tell=told.append), queue_size=2, close_timeout_s=0.05
    )
    sink.write(1, {})
    assert hanging.begun.wait(10)
    for step in range(2, 7):
        sink.write(step, {})
    assert sink.num_dropped == 3
    sink.close()
    (warning,) = told
    assert warning.startswith("warning: metrics to mine: it has not taken the last 2 rows. The run goes on")
    hanging.released.set()
    sink._thread.join(10)
    assert not sink._thread.is_alive() and hanging.steps == [1, -1]


def test_rows_that_a_slow_sink_has_not_written_are_waited_for(tmp_path: Path) -> None:
    slow = Hanging()
    sink = BackgroundSink("mine", slow, start_at(tmp_path), queue_size=8, close_timeout_s=60.0)
    for step in (1, 2, 3):
        sink.write(step, {})
    threading.Timer(0.05, slow.released.set).start()
    sink.close()
    assert slow.steps == [1, 2, 3, -1] and sink.num_dropped == 0


OWN = """
from pathlib import Path

class Mine:
    def __init__(self, fails_at=()):
        self.fails_at = fails_at
    def open(self, start) -> None:
        self.path = start.run_dir / "mine.txt"
        if "open" in self.fails_at:
            raise SystemExit("no such place")
    def write(self, step, values):
        if step in self.fails_at:
            raise RuntimeError(f"step {step}")
        with self.path.open("a") as file:
            file.write(f"{step} {sorted(values)}\\n")
    def close(self) -> None:
        pass

class NoSink(Mine):
    def write(self, values, step):
        pass
"""


def sinks_of(tmp_path: Path, target: str, told: list[str], **options: Any) -> RunSinks:
    config = MetricsConfig.model_validate(
        {"sinks": [{"kind": "plugin", "target": f"{tmp_path / 'own.py'}:{target}", "options": options}]}
    )
    (tmp_path / "own.py").write_text(OWN)
    check_sinks(config)
    file = JsonLinesSink(tmp_path / "metrics.jsonl", last_step=0)
    return RunSinks(config, start_at(tmp_path, tell=told.append), file)


def test_a_sink_of_ones_own_loses_only_the_rows_that_it_raises_at(tmp_path: Path) -> None:
    told: list[str] = []
    sinks = sinks_of(tmp_path, "Mine", told, fails_at=[2, 3])
    for step in range(1, 4):
        sinks.write(step, {"reward/mean": 1.0})
    (mine,) = sinks._others
    while mine.num_dropped < 2:
        threading.Event().wait(0.01)
    sinks.write(4, {"reward/mean": 1.0})
    sinks.close()
    assert (
        tmp_path / "mine.txt"
    ).read_text() == "1 ['reward/mean']\n4 ['reward/mean', 'sink/Mine/dropped']\n"
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row.get("sink/Mine/dropped") for row in rows][-1] == 2.0 and len(rows) == 4
    (warning,) = told
    assert warning.startswith("warning: metrics to Mine: RuntimeError: step 2. The run goes on")


def test_one_that_cannot_be_opened_gets_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    sinks = sinks_of(tmp_path, "Mine", told, fails_at=["open"])
    sinks.write(1, {"reward/mean": 1.0})
    sinks.close()
    assert not (tmp_path / "mine.txt").exists() and sinks._others[0].num_dropped == 1
    assert len(told) == 1 and "SystemExit: no such place" in told[0]


@pytest.mark.parametrize(
    ("sink", "wrong"),
    [
        (
            {"kind": "plugin", "target": "OWN:NoSink"},
            "'values' stands where 'step' is passed; a metric sink is",
        ),
        ({"kind": "plugin", "target": "OWN:Mine", "options": {"fails": 1}}, "cannot be made as Mine"),
        ({"kind": "plugin", "target": "OWN:Other"}, "has no 'Other'"),
        ({"kind": "wandb", "api_key_file": "env:NO_SUCH_VARIABLE_9"}, "no variable NO_SUCH_VARIABLE_9"),
    ],
)
def test_a_sink_that_cannot_work_is_refused_before_the_run(
    tmp_path: Path, sink: dict[str, Any], wrong: str
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    sink = {
        key: value.replace("OWN", str(tmp_path / "own.py")) if key == "target" else value
        for key, value in sink.items()
    }
    with pytest.raises(ConfigError, match=r"metrics\.sinks: ") as refused:
        check_sinks(MetricsConfig.model_validate({"sinks": [sink]}))
    assert wrong in str(refused.value)


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="tensorboard needs the package tensorboardX; install it"):
        check_sinks(MetricsConfig())


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("[{kind: tensorboard}, {kind: tensorboard}]", "tensorboard stands there twice"),
        ("[{kind: wandb, projct: a}]", "project"),
        ("[{kind: tensorbord}]", "tensorboard"),
    ],
)
def test_options_of_sinks_are_checked_when_they_are_read(written: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load_config("quickstart", [f"metrics.sinks={written}"])
