"""The loop that the documents tell of: evaluate, keep what passed, fine-tune on it, go on from there, and evaluate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from polyturn.rollout.evaluation.directory import EPISODES, entry_directory, read_evaluation, read_lines
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.sinks.json_lines import read_metrics
from tests.support.command_line import in_this_process

pytestmark = pytest.mark.stack

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the loop goes from test to test: `evaluation`, `rows.jsonl`, `run`."""
    return tmp_path_factory.mktemp("loop")


def test_what_passed_is_learnt_and_a_resume_goes_on(folder: Path) -> None:
    evaluation, rows, path = folder / "evaluation", folder / "rows.jsonl", folder / "run"
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


@contextmanager
def evaluating(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "polyturn", "eval", "run", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def url_of_engine(process: subprocess.Popen[str]) -> str:
    """Where the only engine of an evaluation listens."""
    for child in psutil.Process(process.pid).children(recursive=True):
        command = child.cmdline()
        if "polyturn.rollout.engines.sglang_main" in command and "--port" in command:
            return f"http://127.0.0.1:{command[command.index('--port') + 1]}"
    raise AssertionError("it has no engine")


def ctl(directory: Path, *arguments: str) -> str:
    done = in_this_process("eval", "ctl", str(directory), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_learnt_is_evaluated_from_its_checkpoint_and_where_it_is_served_already(
    folder: Path,
) -> None:
    """The engine of one evaluation, which is paused meanwhile, plays another one as somebody's running server."""
    run_path, own, other = folder / "run", folder / "own", folder / "other"
    checkpoint = sorted((run_path / "checkpoints").iterdir())[-1]
    tasks = ("evaluation.num_tasks=8", "evaluation.temperature=0")
    arguments = ("two-hop", "--model", str(checkpoint), "--directory", str(own), *tasks)
    assert in_this_process("eval", "ctl", str(own), "status").returncode == 2  # and what it imports is there
    with evaluating(*arguments, "rollout.max_concurrent_episodes=1") as process:
        deadline = time.monotonic() + 400
        while not list(read_lines(own / EPISODES)):
            assert process.poll() is None and time.monotonic() < deadline, "no episode ended"
            time.sleep(0.05)
        assert "no further episode starts" in ctl(own, "pause")
        served = ("--policy", f"sglang:{url_of_engine(process)}", "--model", str(run_path))
        done = in_this_process("eval", "run", "two-hop", *served, "--directory", str(other), *tasks)
        assert done.returncode == 0, done.stderr
        ctl(own, "set", "max_concurrent_episodes=16")
        ctl(own, "resume")
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    results = [json.loads(said.splitlines()[-1]) for said in (output, done.stdout)]
    assert results[0]["model"] == str(checkpoint) and results[0]["num_left"] == results[1]["num_left"] == 0
    assert [path.name for path in own.rglob("*engine*.log")] == ["engine_0.log"], "its entries share one"
    assert not list(other.rglob("*engine*.log"))
    for directory in (own, other):
        for entry in read_evaluation(directory).entries:
            store = TrajectoryStore(entry_directory(directory, entry.name))
            stored = {one.episode_id: one for step in store.steps() for one in store.read_step(step)}
            store.close()
            assert len(entry.episodes) == entry.num_asked == 8
            for line in entry.episodes:
                episode = stored[line.episode_id]
                assert line.num_completion_tokens == episode.num_sampled_tokens > 0
                assert line.num_prompt_tokens >= len(episode.segments[0]) - episode.num_sampled_tokens
    compared = in_this_process("eval", "compare", str(own), str(other), "--json")
    assert compared.returncode == 0, compared.stderr
    assert json.loads(compared.stdout)["overall"]["effect"] == 0, "the same weights say the same"
    before = (other / EPISODES).read_bytes()
    again = in_this_process("eval", "resume", str(other))
    assert again.returncode == 0, again.stderr
    assert (other / EPISODES).read_bytes() == before, "nothing was left to be played"
