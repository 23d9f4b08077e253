"""Policies and critics of tests, from a small model and few settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.objective import KLInLoss
from polyturn.configs.schema.run import ModelConfig, RunConfig
from polyturn.configs.schema.trainer import CheckpointConfig, CriticConfig, OptimizerConfig, ParallelConfig
from polyturn.trainer.megatron.critic import MegatronCritic
from polyturn.trainer.megatron.policy import MegatronPolicy
from polyturn.trainer.megatron.process_groups import Place


def policy_config(
    path: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    megatron: dict[str, Any] | None = None,
    keep_reference: bool = False,
    reference_path: Path | None = None,
    initial_path: Path | None = None,
    load_optimizer: bool = True,
    routing_replay: bool = False,
    **trainer: Any,
) -> RunConfig:
    """The quickstart's config with another model, on one rank unless `parallel` says otherwise.

    Args:
        trainer: fields of the section `trainer`.
    """
    config = load_config("quickstart")
    algorithm = config.trainer.algorithm
    if keep_reference:
        algorithm = algorithm.model_copy(update={"kl": KLInLoss(kind="in_loss")})
    defaults = {
        "parallel": ParallelConfig(),
        "optimizer": OptimizerConfig(),
        "max_tokens_per_gpu": 8192,
        "algorithm": algorithm,
    }
    reference = None if reference_path is None else str(reference_path)
    return config.model_copy(
        update={
            "model": ModelConfig(path=str(path), dtype=dtype, reference_path=reference),
            "trainer": config.trainer.model_copy(update={**defaults, **trainer}),
            "engines": config.engines.model_copy(update={"routing_replay": routing_replay}),
            "checkpoint": CheckpointConfig(load=initial_path, load_optimizer=load_optimizer),
            "megatron": megatron or {},
        }
    )


def make_policy(path: Path, *, place: Place | None = None, **settings: Any) -> MegatronPolicy:
    """A policy of `policy_config`'s settings."""
    return MegatronPolicy(policy_config(path, **settings), place)


def save_checkpoint(policy: MegatronPolicy, directory: Path) -> None:
    """Write a checkpoint and wait for it."""
    policy.begin_checkpoint(directory)
    policy.checkpoints.finish()


def make_critic(
    path: Path, *, optimizer: OptimizerConfig, value_clip: float = 0.3, **settings: Any
) -> MegatronCritic:
    """A critic, whose process is a rank already, of `policy_config`'s settings and its own optimizer."""
    critic = CriticConfig().model_copy(update={"optimizer": optimizer, "value_clip": value_clip})
    return MegatronCritic(policy_config(path, critic=critic, **settings))
