"""A working directory with a tiny model, and the command line in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import Run, command_line
from tests.support.model_directory import write_model

RECIPE = """\
extends: quickstart
name: test
model: {path: model}
output_dir: runs
"""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe that passes preflight, with its model."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def polyturn(workspace: Path) -> Run:
    """Runs `polyturn ARGUMENTS...` in the workspace."""
    return command_line(workspace)
