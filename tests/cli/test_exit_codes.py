"""How `polyturn train` ends: 0, 1 for a run that failed, 130 for one that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polyturn.cli.main import app
from polyturn.configs.schema.run import RunConfig

run = pytest.importorskip("polyturn.trainer.run.train", reason="training is not installed")


def train(monkeypatch: pytest.MonkeyPatch, outcome: BaseException | Path) -> Any:
    """`polyturn train` with a run that ends so; what leads to it and away from it is real."""

    def ended(config: RunConfig, *, warnings: list[str]) -> Path:
        assert config.name == "test" and warnings == []
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(run, "train", ended)
    return CliRunner().invoke(app, ["train", "recipe.yaml"])


@pytest.mark.usefixtures("workspace")
def test_the_last_line_names_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(monkeypatch, Path("runs/test-1"))
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "run: runs/test-1")


@pytest.mark.usefixtures("workspace")
def test_a_failed_check_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyturn.trainer.run.checks import CheckFailure

    result = train(monkeypatch, CheckFailure("step 3: group 7 has 5 episodes"))
    assert (result.exit_code, result.stdout, result.stderr) == (
        1,
        "",
        "error: step 3: group 7 has 5 episodes\n",
    )


@pytest.mark.usefixtures("workspace")
def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyturn.trainer.run.failures import Interrupted

    result = train(monkeypatch, Interrupted(Path("runs/test-1"), 4))
    assert result.exit_code == 130
    assert "stopped after step 4" in result.stdout
    assert result.stdout.splitlines()[-1] == "run: runs/test-1"


@pytest.mark.usefixtures("workspace")
def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.usefixtures("workspace")
def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(monkeypatch, ValueError("a bug"))
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
