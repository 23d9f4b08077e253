"""Recipes come to the arithmetic and placement of the documents that they follow; docs/recipes.md has all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from polyturn.configs.loading.loader import CONFIGS_DIRECTORY, load_config, shipped_names
from polyturn.configs.models import resolve_model_path
from polyturn.configs.sizing.memory import check_layout
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.placement import plan_placement, planned_nodes
from polyturn.trainer.run.model_checks import check_memory

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
# GPUs of the trainer, of all engines, of one engine; tensor, context, data; tokens of a GPU: of slime's pages.
REFERENCE = {
    "glm_4_9b": (4, 4, 2, 2, 2, 1, 4608),
    "glm_4_9b_colocated": (8, 8, 2, 2, 2, 2, 4608),
    "qwen3_4b": (8, 8, 2, 2, 1, 4, 9216),
    "qwen3_4b_disaggregated": (2, 6, 2, 2, 1, 1, 9216),
    "qwen3_4b_fp8": (8, 8, 2, 2, 1, 4, 9216),
    "qwen3_4b_async": (2, 6, 2, 2, 1, 1, 9216),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_recipe_of_the_reference_documents(name: str) -> None:
    trainer_gpus, engine_gpus, per_engine, tensor, context, data, tokens = REFERENCE[name]
    config = load_config(name)
    rollout, trainer = config.rollout, config.trainer
    # --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
    assert rollout.prompts_per_step * rollout.samples_per_prompt == 256 == trainer.global_batch_size
    assert (trainer.updates_per_step, trainer.num_steps, rollout.sampling.temperature) == (1, 3000, 0.8)
    assert config.environment.max_tokens_per_turn == 8192
    parallel = trainer.parallel
    assert (parallel.tensor, parallel.context, parallel.data, parallel.world_size) == (
        tensor,
        context,
        data,
        trainer_gpus,
    )
    assert trainer.max_tokens_per_gpu == tokens
    assert (config.engines.tensor_parallel, config.engines.num_engines * per_engine) == (
        per_engine,
        engine_gpus,
    )
    loss, optimizer = trainer.algorithm.loss, trainer.optimizer
    assert (loss.clip_low, loss.clip_high) == (0.2, 0.28)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.beta1, optimizer.beta2) == (
        1e-6,
        0.1,
        0.9,
        0.98,
    )

    shape = ModelShape.read(resolve_model_path(config.model.path, needs_weights=False))
    check_layout(config, shape)
    check_memory(config, shape)
    [node] = planned_nodes(config)
    placement = plan_placement(config, [node])
    devices = [gpu for engine in placement.engines["engines"] for seat in engine.seats for gpu in seat.gpus]
    of_the_trainer = list(range(trainer_gpus))
    assert sorted(devices) == (
        of_the_trainer if config.engines.placement == "shared" else list(range(trainer_gpus, 8))
    )


def test_dapo_math_has_the_papers_sizes() -> None:
    """arXiv 2503.14476, section 4.1."""
    config = load_config("dapo_math")
    rollout, trainer, shaping = config.rollout, config.trainer, config.trainer.algorithm.reward_shaping
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, trainer.updates_per_step) == (512, 16, 16)
    assert trainer.global_batch_size * trainer.updates_per_step == 512 * 16
    assert config.environment.max_tokens_per_turn == shaping.max_tokens == 16384 + shaping.buffer_tokens
    # A warm-up of 20 rollout steps.
    assert trainer.optimizer.warmup_updates == 20 * trainer.updates_per_step
    assert trainer.algorithm.kl.kind == "none"


def test_every_recipe_is_in_the_table() -> None:
    (table, *_) = PAGE.split("\nA recipe for GPUs")
    listed = re.findall(r"^\| \[?`(\w+)`", table, re.MULTILINE)
    assert sorted(listed) == sorted(shipped_names("recipe"))


def test_names_of_recipes_are_one_each_whatever_their_folder() -> None:
    names = [path.stem for path in (CONFIGS_DIRECTORY / "recipes").rglob("*.yaml")]
    assert sorted(names) == shipped_names("recipe")
    assert load_config("qwen3_4b_async").name == load_config("qwen3_4b_async.yaml").name == "qwen3_4b_async"


# Prompts, samples, updates, steps, learning rate; GPUs of the trainer, of all engines, of one; tokens of a turn, turns:
# of the published runs that the READMEs name.
PUBLISHED = {
    "search_r1_3b_instruct": (512, 5, 2, 330, 1e-6, 8, 8, 2, 500, 3),
    "search_r1_7b": (512, 5, 2, 1005, 1e-6, 8, 8, 1, 500, 5),
    "retool": (512, 16, 8, 150, 1e-6, 16, 16, 4, 16384, 8),
    "gsm8k": (1024, 5, 4, 140, 1e-6, 4, 4, 1, 1024, 1),
    "asynchronous": (256, 5, 1, 560, 1e-6, 2, 2, 1, 1024, 1),
    "customer_service": (32, 8, 1, 500, 1e-6, 8, 8, 1, 1024, 24),
    "multi_agent": (32, 8, 1, 3000, 1e-6, 8, 8, 8, 8192, 11),
    "distillation": (16, 4, 1, 300, 1e-6, 2, 2, 1, 16384, 1),
    "lora": (64, 5, 1, 1740, 3e-6, 2, 2, 1, 1024, 1),
    "glm_4_5_355b": (128, 8, 4, 3000, 1e-6, 64, 64, 32, 32768, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_of_a_published_run(name: str) -> None:
    config = load_config(name)
    rollout, trainer, environment = config.rollout, config.trainer, config.environment
    placement = plan_placement(config, planned_nodes(config))
    engines = placement.engines["engines"]
    gpus = [sum(len(seat.gpus) for seat in engine.seats) for engine in engines]
    assert len(set(gpus)) == 1
    assert (
        rollout.prompts_per_step,
        rollout.samples_per_prompt,
        trainer.updates_per_step,
        trainer.num_steps,
        trainer.optimizer.learning_rate,
        trainer.parallel.world_size,
        sum(gpus),
        gpus[0],
        environment.max_tokens_per_turn,
        environment.max_turns,
    ) == PUBLISHED[name]
    seats = {(seat.node, gpu) for engine in engines for seat in engine.seats for gpu in seat.gpus}
    assert len(seats) == sum(gpus), "no two engines share a GPU"
