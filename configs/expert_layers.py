"""Which layers of a model have a mixture of experts, by its Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyturn.configs.errors import ConfigError


def num_experts(hf: Mapping[str, Any]) -> int:
    """Routed experts of a layer that has any; 0 for a dense model."""
    # Families, and releases of transformers, name it differently.
    for key in ("n_routed_experts", "num_experts", "num_local_experts"):
        if hf.get(key):
            _check(_is_count(hf[key]), f"{key} must be an integer")
            return int(hf[key])
    return 0


def expert_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each layer, whether it has experts in place of one MLP.

    DeepSeek V3 and GLM-4.5 begin with `first_k_dense_replace` dense layers, and then have experts in every
    `moe_layer_freq`-th; Qwen3-MoE has them in every `decoder_sparse_step`-th layer but `mlp_only_layers`.

    Raises:
        ConfigError: one of these is no integer, or no list.
    """
    num_layers = int(hf["num_hidden_layers"])
    if "first_k_dense_replace" in hf:
        first, every = hf["first_k_dense_replace"] or 0, hf.get("moe_layer_freq") or 1
        if isinstance(every, list):
            _check(
                len(every) == num_layers, f"moe_layer_freq must have an entry for each of {num_layers} layers"
            )
            return tuple(bool(has_experts) for has_experts in every)
        _check(
            _is_count(first) and _is_count(every), "first_k_dense_replace and moe_layer_freq must be integers"
        )
        return tuple(i >= first and i % every == 0 for i in range(num_layers))
    if num_experts(hf):
        step, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
        _check(_is_count(step), "decoder_sparse_step must be an integer")
        _check(isinstance(dense, list) and all(map(_is_count, dense)), "mlp_only_layers must list layers")
        return tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers))
    return (False,) * num_layers


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check(is_right: bool, told: str) -> None:
    if not is_right:
        raise ConfigError(f"the model's config.json: {told}")
