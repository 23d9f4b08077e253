"""The layers of a model as Megatron-core's specs, the same tree with Transformer Engine's modules and with torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import megatron.core.transformer.multi_latent_attention as latent_attention
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from polyturn.trainer.megatron.torch_layers import TorchSpecProvider


@dataclass
class SandwichLayerSubmodules(TransformerLayerSubmodules):
    post_norm: ModuleSpec | type = IdentityOp
    """Of the outputs of attention and MLP."""


class SandwichLayer(TransformerLayer):
    """A layer that norms the outputs of its attention and of its MLP before it adds them to the residual."""

    self_attn_bda: Any
    mlp_bda: Any

    def __init__(
        self, config: TransformerConfig, submodules: SandwichLayerSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = build_module(submodules.post_norm, **sizes)
        self.post_mlp_layernorm = build_module(submodules.post_norm, **sizes)
        self.self_attn_bda = _norm_before(self.post_self_attn_layernorm, self.self_attn_bda)
        self.mlp_bda = _norm_before(self.post_mlp_layernorm, self.mlp_bda)


def _norm_before(norm: torch.nn.Module, make_add: Callable[..., Any]) -> Callable[..., Any]:
    """Upstream's `bias, dropout, add` of a block's output, which is normed first."""

    def make_normed_add(training: bool, fused: bool) -> Callable[..., Any]:
        add = make_add(training, fused)

        def normed_add(
            output_with_bias: tuple[torch.Tensor, torch.Tensor | None], *args: Any
        ) -> torch.Tensor:
            output, bias = output_with_bias
            assert bias is None, "a bias would have to be added before the norm"
            return add((norm(output), None), *args)

        return normed_add

    return make_normed_add


def spec_provider(device: str) -> Any:
    """Transformer Engine's modules where there are any, and torch's elsewhere."""
    if HAVE_TE and device == "cuda":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return TorchSpecProvider()


def block_spec(
    config: TransformerConfig, *, sandwich_norms: bool, device: str, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """The decoder layers of one pipeline stage, or of one of its virtual stages."""
    backend = spec_provider(device)
    dense = _layer_spec(config, backend, num_experts=None, sandwich_norms=sandwich_norms)
    layers = [dense] * config.num_layers
    if config.num_moe_experts:
        mixture = _layer_spec(
            config, backend, num_experts=config.num_moe_experts, sandwich_norms=sandwich_norms
        )
        assert isinstance(config.moe_layer_freq, list)
        layers = [mixture if has_experts else dense for has_experts in config.moe_layer_freq]
    start = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=layers[start : start + num_layers], layer_norm=backend.layer_norm()
    )


def _layer_spec(
    config: TransformerConfig, backend: Any, *, num_experts: int | None, sandwich_norms: bool
) -> ModuleSpec:
    is_latent = config.multi_latent_attention
    norm = backend.layer_norm()
    submodules: dict[str, Any] = {
        # Elsewhere the norm is one module with the linear layer behind it.
        "input_layernorm": norm if is_latent else IdentityOp,
        "self_attention": _latent_attention(backend) if is_latent else _attention(config, backend),
        "self_attn_bda": get_bias_dropout_add,
        "pre_mlp_layernorm": norm if num_experts else IdentityOp,
        "mlp": get_mlp_module_spec_for_backend(
            backend=backend, num_experts=num_experts, moe_grouped_gemm=num_experts is not None
        ),
        "mlp_bda": get_bias_dropout_add,
    }
    if sandwich_norms:
        return ModuleSpec(
            module=SandwichLayer, submodules=SandwichLayerSubmodules(**submodules, post_norm=norm)
        )
    return ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(**submodules))


def _attention(config: TransformerConfig, backend: Any) -> ModuleSpec:
    head_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _latent_attention(backend: Any) -> ModuleSpec:
    # Upstream compares its modules with this one, which is a mock where Transformer Engine is missing.
    latent_attention.TELinear = backend.linear()
    return ModuleSpec(
        module=MLASelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=backend.column_parallel_linear(),
            linear_q_down_proj=backend.linear(),
            linear_q_up_proj=backend.column_parallel_layer_norm_linear(),
            linear_kv_down_proj=backend.linear(),
            linear_kv_up_proj=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp,
            kv_layernorm=IdentityOp,
        ),
    )
