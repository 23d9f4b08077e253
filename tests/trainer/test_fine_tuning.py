"""The loop that the documents tell of: evaluate, keep what passed, fine-tune on it, and go on from there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.sinks.json_lines import read_metrics

SMALL = (
    "trainer.parallel.data=1",
    "trainer.global_batch_size=8",
    "trainer.optimizer.learning_rate=1e-3",
    "metrics.sinks=[]",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "polyturn.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.stack
def test_what_passed_is_learnt_and_a_resume_goes_on(tmp_path: Path) -> None:
    evaluation, rows, path = tmp_path / "evaluation", tmp_path / "rows.jsonl", tmp_path / "run"
    played = ("eval", "run", "quickstart", "--policy", "oracle", "evaluation.num_tasks=24")
    run(*played, "--directory", str(evaluation))
    curated = json.loads(
        run("eval", "curate", str(evaluation), "--output", str(rows)).stdout.splitlines()[-1]
    )
    assert curated["num_rows"] == 24 and curated["num_with_tokens"] == 0
    tune = (
        "sft",
        "quickstart",
        "--data",
        str(rows),
        *SMALL,
        f"run_dir={path}",
        "supervised.heldout_share=0.25",
    )
    done = run(*tune, "supervised.epochs=2", "trainer.num_steps=3")
    assert "18 rows to train on" in done.stderr and "6 held out" in done.stderr
    run(*tune, "supervised.epochs=4", "resume=true")
    metrics = read_metrics(path / "metrics.jsonl")
    # Four epochs of 18 rows, 8 in a step; three steps were taken before.
    assert [row["step"] for row in metrics] == list(range(1, 10))
    assert not [name for row in metrics for name in row if re.match("offpolicy|reward|train/policy_kl", name)]
    losses = json.loads((path / "summary.json").read_text())["heldout_loss"]
    assert losses["after"] == metrics[-1]["heldout/loss"] < losses["before"]
    store = TrajectoryStore(path)
    taught = [episode.task_id for step in store.steps() for episode in store.read_step(step)]
    store.close()
    assert len(taught) == 72 and {taught.count(task) for task in taught} == {4}
    # The policy is a model directory as any other: it is fine-tuned on, from where it stands.
    again = run(
        "sft", "quickstart", "--data", str(rows), *SMALL, f"model.path={path / 'policy'}", "--dry-run"
    )
    assert "# batch" in again.stdout and "24 rendered" in again.stderr
