"""What a config asks for, in numbers: the batch, and how many GPUs."""

from __future__ import annotations

import os

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.algorithm import GroupedSection
from polyturn.configs.schema.run import RunConfig


def check_batch(config: RunConfig) -> str:
    """The batch arithmetic as a line to print.

    `prompts_per_step x samples_per_prompt = global batch x updates per step`. Raises ConfigError where it
    does not hold, with both sides and a way to mend it, and where a group or a rank's share would be empty.
    """
    rollout, trainer = config.rollout, config.trainer
    episodes = rollout.prompts_per_step * rollout.samples_per_prompt
    trained = trainer.global_batch_size * trainer.updates_per_step
    sampled_side = f"{rollout.prompts_per_step} x {rollout.samples_per_prompt} = {episodes}"
    trained_side = f"{trainer.global_batch_size} x {trainer.updates_per_step} = {trained}"
    if episodes != trained:
        if episodes % trainer.updates_per_step == 0:
            fix = f"trainer.global_batch_size={episodes // trainer.updates_per_step}"
        else:
            fix = f"trainer.global_batch_size={episodes} trainer.updates_per_step=1"
        raise ConfigError(
            "rollout.prompts_per_step x rollout.samples_per_prompt must equal trainer.global_batch_size x "
            f"trainer.updates_per_step, but {sampled_side} and {trained_side}; for example set {fix}"
        )
    advantages = [algorithm.advantage for algorithm in trainer.algorithms]
    compares = any(
        isinstance(found, GroupedSection) and found.singletons != "batch_mean" for found in advantages
    )
    if rollout.samples_per_prompt == 1 and compares:
        raise ConfigError(
            "rollout.samples_per_prompt is 1, but a group of one episode has no baseline and trains nothing; "
            "use at least 2, or a trainer.algorithm.advantage that does not compare within groups (ppo_gae)"
        )
    if trainer.global_batch_size < trainer.parallel.data:
        raise ConfigError(
            f"trainer.global_batch_size is {trainer.global_batch_size}, less than one episode for each of "
            f"the trainer.parallel.data={trainer.parallel.data} ranks; lower trainer.parallel.data"
        )
    return (
        f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {episodes} episodes "
        f"a step = {trainer.global_batch_size} global batch x {trainer.updates_per_step} update(s)"
    )


def num_gpus(config: RunConfig) -> int:
    """GPUs that the run needs: trainer ranks have their own, and so have engines that do not take turns with them."""
    engines, trainer = config.engines, config.trainer
    for_engines = engines.num_own_gpus if config.plays else 0
    served = sum(model.engines.num_gpus for model in config.served_models if model.is_managed)
    return for_engines + served + (trainer.num_ranks if trainer.device == "cuda" else 0)


def num_cores() -> int:
    """Cores that this process may use."""
    # Not every system can say which; macOS cannot.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
