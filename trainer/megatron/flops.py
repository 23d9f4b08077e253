"""What the layers of a rank cost, in floating-point operations.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

FORWARD_AND_BACKWARD = 3
"""The backward pass has two products for each one of the forward pass. What is computed again is not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFlops:
    """Of one update, in this rank's share of the layers; embeddings and output layer are not among them."""

    token: float
    """For each token: two for each weight that it meets, of experts those that it is sent to."""
    pair: float
    """For each pair of a token and one that it attends to."""


def layer_flops(chunks: Iterable[GPTModel]) -> LayerFlops:
    """Of the parts of a model that a rank holds."""
    token = pair = 0.0
    for chunk in chunks:
        config = chunk.config
        for name, param in chunk.decoder.named_parameters():
            if param.dim() > 1:
                token += 2.0 * param.numel() * (_active_share(config) if ".experts." in name else 1.0)
        pair += len(chunk.decoder.layers) * 2.0 * _attended_width(config)
    return LayerFlops(token=FORWARD_AND_BACKWARD * token, pair=FORWARD_AND_BACKWARD * pair)


def _active_share(config: TransformerConfig) -> float:
    """Of this rank's experts, how many for each of its own tokens: other ranks send theirs, and are sent its own."""
    assert config.num_moe_experts is not None
    return config.moe_router_topk * config.expert_model_parallel_size / config.num_moe_experts


def _attended_width(config: TransformerConfig) -> int:
    """Products for a pair: the width of keys and of values, of all heads of this rank."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    if isinstance(config, MLATransformerConfig):
        return heads * (config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim)
    assert config.kv_channels is not None
    return heads * 2 * config.kv_channels
