"""`--dry-run` of a published model's shape, and a run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyturn.cli.main import app

RECIPE = """
extends: [quickstart, "preset:glm-4.5-355b"]
name: big
rollout: {prompts_per_step: 4, samples_per_prompt: 4}
engines: {device: cuda, tensor_parallel: 8}
trainer: {global_batch_size: 16, parallel: {data: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "big.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_dry_run_of_a_preset_asks_nothing_of_this_machine(recipe: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "estimated from 352,797,814,784 parameters" in done.output
    assert "trainer rank of stage 3 (x 16)" in done.output
    assert "trainer rank 63" in done.output and "pipeline 3, expert 15" in done.output


def test_a_run_of_a_preset_is_refused() -> None:
    done = CliRunner().invoke(app, ["train", "quickstart", "model.path=preset:qwen3-4b"])
    assert done.exit_code == 2, done.output
    assert "is the shape of a published model, without its weights" in done.output
    assert len(done.output.strip().splitlines()) == 1
