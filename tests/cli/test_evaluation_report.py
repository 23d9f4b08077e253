"""`polyturn eval report` and `compare`, of directories as they are on disk."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from polyturn.rollout.evaluation.directory import EpisodeLog, write_plan
from polyturn.rollout.evaluation.plan import EvaluationPlan, PlannedEntry, Player
from tests.rollout.evaluation.evaluations import entry_of
from tests.support.command_line import in_this_process

BEFORE = [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]] * 5
AFTER = [[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]] * 5


def write(directory: Path, scores: list[list[float | None]], *, temperature: float = 1.0) -> Path:
    """An evaluation of two entries, as `eval run` leaves it."""
    names = ("math", "search")
    entries = [
        PlannedEntry(
            name=name,
            environment="polyturn/Math-v0",
            split="test",
            num_tasks=len(scores),
            samples_per_task=2,
            success_score=1.0,
            config={"evaluation": {"temperature": temperature}, "environment": {"max_turns": 4}},
        )
        for name in names
    ]
    player = Player(name="model", label=f"model of {directory.name}")
    write_plan(
        directory, EvaluationPlan(suite="smoke", player=player, package="0", created="now", entries=entries)
    )
    with closing(EpisodeLog(directory)) as log:
        for name in names:
            for episode in entry_of(scores, name).episodes:
                log.append(episode)
    return directory


def test_a_report_is_printed_plain_and_left_in_the_directory(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", BEFORE)
    done = in_this_process("eval", "report", str(directory))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "smoke, played by model of a" in done.stdout
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    row = next(line for line in lines if line[0].startswith("math"))
    assert [cell.strip() for cell in row if cell.strip()] == [
        "math", "0.375", "[0.214, 0.565]", "40/40 (100.0%)", "20/20", "0.0%",
    ]  # fmt: skip
    report = json.loads((directory / "report.json").read_text())
    assert report["overall"]["verdict"] == 0.375 and report["coverage_floor"] == 0.95
    printed = in_this_process("eval", "report", str(directory), "--json")
    assert json.loads(printed.stdout) == report
    table = pq.read_table(directory / "episodes.parquet")
    assert table.num_rows == 80 and table["score"].to_pylist()[:4] == [1.0, 0.0, 0.0, 0.0]


def test_without_enough_scores_there_is_no_verdict(tmp_path: Path) -> None:
    directory = write(tmp_path / "a", [[1.0, None], [1.0, 1.0]])
    text = in_this_process("eval", "report", str(directory)).stdout
    assert "math: no verdict, as 75.0% of the episodes have a score and 95% are needed" in text
    assert "of what was scored 1.000, of all between 0.750 and 1.000" in text
    assert "math: 1 failed by infrastructure" in text and "math: 1x the search server is gone" in text
    enough = in_this_process("eval", "report", str(directory), "--coverage-floor", "0.7").stdout
    assert "no verdict" not in enough


@pytest.mark.parametrize("width", [30, 60, 160])
def test_nothing_is_cut_on_a_terminal_however_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    directory = write(tmp_path / "a", BEFORE)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    text = in_this_process("eval", "report", str(directory)).stdout
    assert "\x1b[" in text, "a terminal has bold headings"
    assert "…" not in text
    assert "".join(text.split()).count("[0.214,0.565]") == 10, (
        "of two entries the score, k=1 thrice, majority@2"
    )
    assert ("entry: math" in text) == (width < 100)


def test_a_comparison_names_what_flipped_and_what_differs(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", BEFORE), write(tmp_path / "b", AFTER, temperature=0.5)
    done = in_this_process("eval", "compare", str(a), str(b))
    assert done.returncode == 0, done.stderr
    assert "warning: math: sampling.temperature differs: 1.0 in A, 0.5 in B" in done.stdout
    assert "math: gained by B: task-1, task-5, task-9, task-13, task-17" in done.stdout
    found = json.loads(in_this_process("eval", "compare", str(a), str(b), "--json").stdout)
    assert found["overall"]["verdict"] == "better"
    assert found["overall"]["effect"] == pytest.approx(0.375)
    assert [entry["name"] for entry in found["entries"]] == ["math", "search"]
    assert found["entries"][0]["result"]["p_adjusted"] >= found["entries"][0]["result"]["p_value"]


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    for command in (["report"], ["compare", str(tmp_path)]):
        done = in_this_process("eval", *command, str(tmp_path))
        assert done.returncode == 2 and "is no evaluation" in done.stderr
    a, empty = write(tmp_path / "a", BEFORE), write(tmp_path / "empty", [[None, None]])
    refused = in_this_process("eval", "compare", str(a), str(empty))
    assert refused.returncode == 2 and "none of them has a score in both" in refused.stderr
