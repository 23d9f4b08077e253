"""What a run meets on a real machine, on real parts: a full disk, nothing to learn from, a check that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from polyturn.rollout.store import TrajectoryStore, read_episodes
from polyturn.trainer.sinks.json_lines import read_metrics

pytestmark = pytest.mark.stack

SMALL = (
    "trainer.num_steps=2",
    "trainer.global_batch_size=4",
    "trainer.updates_per_step=2",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "evaluation.num_tasks=4",
    "evaluation.before=false",
    "evaluation.after=false",
    "environment.max_turns=1",
    "environment.max_tokens_per_turn=8",
)


def train(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "polyturn.cli.main", "train", "quickstart", *SMALL, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def only_error(process: subprocess.CompletedProcess[str], *, code: int = 1) -> str:
    """The one sentence that a run ended with, 1, or did not begin with, 2."""
    assert process.returncode == code, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    (line,) = (line for line in process.stderr.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB: the episodes of a step find room, its checkpoint does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_and_steps_with_nothing_to_learn_from(small_disk: Path, tmp_path: Path) -> None:
    """Every answer is wrong and every group alike, so all updates are empty, before the disk has room and after."""
    rows = [{"prompt": f"what is {i} times {i}?", "answer": f"no such answer {i}"} for i in range(8)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = small_disk / "run"
    overrides = (
        f"run_dir={path}",
        "environment.id=polyturn/SingleTurn-v0",
        f"environment.tasks={tmp_path / 'tasks.jsonl'}",
        f"evaluation.tasks={tmp_path / 'tasks.jsonl'}",
        "evaluation.every_steps=1",
        "reward={kind: rule, name: exact_match}",
        "trainer.algorithm.advantage.uniform=drop",
    )
    full = only_error(train(*overrides))
    assert "No space left on device" in full and f"resume=true run_dir={path} goes on" in full
    store = TrajectoryStore(path)
    assert len(store.journaled(1)) == 8, "what was played is kept"
    assert not list(path.rglob("*.part")), "what could not be finished is removed"
    assert not list((path / "checkpoints").glob("step_??????"))

    kept = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    subprocess.run(["mount", "-o", "remount,ro,size=200m", str(small_disk)], check=True)
    refused = only_error(train(*overrides, "resume=true"), code=2)
    assert f"{path} cannot be written to: Read-only file system" in refused
    subprocess.run(["mount", "-o", "remount,rw,size=200m", str(small_disk)], check=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == kept

    resumed = train(*overrides, "resume=true")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    rows_of_metrics = read_metrics(path / "metrics.jsonl")
    assert [row["step"] for row in rows_of_metrics] == [1, 2]
    for row in rows_of_metrics:
        assert (row["train/empty_updates"], row["group/num_uniform"]) == (2, 4)
        assert row["heldout/num_tasks"] == 4 and row["heldout/mean"] == 0
    assert [row["policy/version"] for row in rows_of_metrics] == [2, 4]
    assert len(read_episodes(path / "evaluation" / "step_000002.parquet")) == 4
    assert not list((path / "journal").iterdir()), "a step that is in a checkpoint needs no journal"


def test_a_check_that_fails_is_one_sentence_and_not_trained_on_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    sentence = only_error(train(f"run_dir={path}", "checks.max_logprob_difference=1e-12"))
    assert "step 1: trainer and engine logprobs differ" in sentence and "more than 1e-12" in sentence
    assert str(path / "set_aside" / "step_000001-1") in sentence
    assert "Traceback" in (path / "logs" / "failure.log").read_text()
    assert TrajectoryStore(path).begun_after(0) == []
    assert len(read_episodes(path / "set_aside" / "step_000001-1" / "step_000001.parquet")) == 8
