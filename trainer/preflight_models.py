"""What can be known to be wrong with the models beside the policy: reference, critic, adapters; and routing replay."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyturn.configs.errors import ConfigError
from polyturn.configs.model_shape import ModelShape
from polyturn.configs.models import read_json, resolve_model_path
from polyturn.configs.schema import RunConfig

FREE_KEYS = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""Keys of config.json in which a reference may differ from the policy: none of them changes a logprob."""


def check_models(config: RunConfig, directory: Path) -> None:
    """Check what the config asks for beside the policy, whose directory is given. Raises ConfigError."""
    _check_reference(config, directory)
    _check_critic(config, directory)
    _check_shared_prefix(config)
    if config.engines.routing_replay and ModelShape.read(directory).experts is None:
        raise ConfigError("engines.routing_replay: the model has no experts; set it to false")


def same_architecture(
    policy: Mapping[str, Any], other: Mapping[str, Any], *, source: Path, what: str
) -> None:
    """Whether another model's config.json, that of `source`, describes the same computation as the policy's.

    Raises:
        ValueError: it does not; names the first key that differs.
    """
    for key in sorted((policy.keys() | other.keys()) - set(FREE_KEYS)):
        if policy.get(key) != other.get(key):
            raise ValueError(
                f"{what}: {source} has {key}={other.get(key)!r} in its config.json, the policy has "
                f"{policy.get(key)!r}; they must be models of one architecture"
            )


def _check_shared_prefix(config: RunConfig) -> None:
    if config.trainer.shared_prefix != "tree":
        return
    if config.megatron.get("apply_rope_fusion"):
        raise ConfigError(
            "trainer.shared_prefix=tree follows the positions of a tree, and megatron.apply_rope_fusion counts from 0; "
            "turn one off"
        )
    if config.trainer.device == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        raise ConfigError(
            "trainer.shared_prefix=tree needs the attention of the torch layers, and with Transformer Engine installed "
            "its own is used; set it to group, which computes samples one by one"
        )


def _check_reference(config: RunConfig, directory: Path) -> None:
    trainer, path = config.trainer, config.model.reference_path
    refresh = trainer.refresh_reference_every_steps
    if not trainer.algorithm.needs_reference:
        for key, given in (
            ("model.reference_path", path),
            ("trainer.refresh_reference_every_steps", refresh),
        ):
            if given:
                raise ConfigError(
                    f"{key} is set, but nothing compares with a reference; set trainer.algorithm.kl"
                )
    if refresh and trainer.lora is not None:
        raise ConfigError(
            "trainer.refresh_reference_every_steps: with trainer.lora the reference is the model without adapters, "
            "which stays what it is; set it to 0"
        )
    if path is not None:
        source = resolve_model_path(path)
        ours, theirs = read_json(directory / "config.json"), read_json(source / "config.json")
        try:
            same_architecture(ours, theirs, source=source, what="model.reference_path")
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _check_critic(config: RunConfig, directory: Path) -> None:
    trainer = config.trainer
    if not trainer.uses_critic:
        return
    critic = trainer.critic
    parallel = critic.parallel if trainer.critic_has_ranks else trainer.parallel
    where = "trainer.critic.parallel" if trainer.critic_has_ranks else "trainer.parallel"
    shape = ModelShape.read(directory if critic.path is None else resolve_model_path(critic.path))
    if shape.num_heads % parallel.tensor or shape.num_kv_heads % parallel.tensor:
        raise ConfigError(
            f"{where}.tensor is {parallel.tensor}, which must divide the critic's {shape.num_heads} attention heads "
            f"and {shape.num_kv_heads} key-value heads"
        )
    if trainer.global_batch_size < parallel.data:
        raise ConfigError(
            f"trainer.global_batch_size is {trainer.global_batch_size}, less than one episode for each of the "
            f"{where}.data={parallel.data} ranks; lower {where}.data"
        )
