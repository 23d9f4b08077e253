"""Which layers of a model have a mixture of experts, by its Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""Families, and releases of transformers, name the number of a layer's experts differently."""


def num_experts(hf: Mapping[str, Any]) -> int:
    """Routed experts of a layer that has any; 0 for a dense model."""
    for key in EXPERT_COUNTS:
        if hf.get(key):
            return int(hf[key])
    return 0


def expert_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each layer, whether it has experts in place of one MLP.

    DeepSeek V3 and GLM-4.5 begin with `first_k_dense_replace` dense layers, and then have experts in every
    `moe_layer_freq`-th; Qwen3-MoE has them in every `decoder_sparse_step`-th layer but `mlp_only_layers`.
    """
    num_layers = int(hf["num_hidden_layers"])
    if hf.get("first_k_dense_replace") is not None:
        every = hf.get("moe_layer_freq") or 1
        if isinstance(every, list):
            return tuple(bool(has_experts) for has_experts in every)
        return tuple(i >= hf["first_k_dense_replace"] and i % every == 0 for i in range(num_layers))
    if num_experts(hf):
        step, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
        return tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers))
    return (False,) * num_layers
