"""What a model family is: how its Hugging Face config and weights become Megatron-core's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polyturn.trainer.megatron.families.mapping import Rows

HFConfig = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The models of one or more `model_type`s."""

    model_types: tuple[str, ...]
    settings: Callable[[HFConfig], dict[str, Any]]
    """Fields of Megatron-core's TransformerConfig, beyond those that all families share."""
    rows: Rows
    refuse: Callable[[HFConfig], None] = lambda _hf: None
    """Raises ValueError for a feature of the family that is not supported."""
    required: tuple[str, ...] = ()
    """Keys that a config must have, beyond those of every family: where they are missing, transformers has defaults of
    its own."""
    rotary_percent: float = 1.0
    """The share of a head's dimensions that is rotated, where the config does not say; where it is 1, all are, whatever
    the config says."""
    sandwich_norms: bool = False
    """The outputs of attention and MLP are normed before they are added, too."""
    latent_norm_epsilon: float | None = None
    """Of the norms inside latent attention, where it is not that of the others."""


def core_settings(hf: HFConfig) -> dict[str, Any]:
    """Fields of Megatron-core's TransformerConfig that all families read alike."""
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "layernorm_epsilon": hf["rms_norm_eps"],
    }
