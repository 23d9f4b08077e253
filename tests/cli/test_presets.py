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
    assert "trainer ranks 56-63" in done.output and "pipeline 3, expert 8-15" in done.output


def test_a_run_of_a_preset_is_refused() -> None:
    done = CliRunner().invoke(app, ["train", "quickstart", "model.path=preset:qwen3-4b"])
    assert done.exit_code == 2, done.output
    assert "is the shape of a published model, without its weights" in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_plan_that_fits_nowhere_is_printed_and_refused() -> None:
    options = [
        "model.path=preset:kimi-k2",
        "engines.device=cuda",
        "trainer.device=cuda",
        "model.dtype=bfloat16",
    ]
    done = CliRunner().invoke(app, ["train", "quickstart", "--dry-run", "checks.enabled=false", *options])
    assert done.exit_code == 2, done.output
    assert "# memory, estimated from 1,026,408,209,408 parameters" in done.stdout
    trainer, engine = done.stderr.strip().splitlines()
    assert trainer.startswith("error: memory: a trainer rank takes: ")
    assert engine.endswith("; engines.tensor_parallel=8 with weight_sync.dtype=fp8_block fits")


def test_a_plan_lists_the_ranks_of_a_critic() -> None:
    options = ["trainer.algorithm.advantage.kind=ppo_gae", "trainer.critic.placement=own"]
    done = CliRunner().invoke(
        app, ["train", "quickstart", "--dry-run", "model.path=preset:qwen3-0.6b", *options]
    )
    assert done.exit_code == 0, done.output
    assert "critic rank (x 1)" in done.stdout


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (
            "trainer.lora={target_modules: [qproj]}",
            "trainer.lora.target_modules names 'qproj', but this model's",
        ),
        ("weight_sync.dtype=fp8_block", "weight_sync.dtype: fp8_block needs engines on GPUs"),
        ("trainer.parallel={tensor: 3}", "trainer.parallel.tensor is 3, which must divide"),
        (
            "megatron={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 5}",
            "divide",
        ),
    ],
)
def test_a_plan_refuses_what_the_trainer_would(option: str, why: str) -> None:
    done = CliRunner().invoke(
        app, ["train", "quickstart", "--dry-run", "model.path=preset:qwen3-0.6b", option]
    )
    assert done.exit_code == 2, done.output
    assert why in done.stderr
