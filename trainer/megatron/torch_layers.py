"""Transformer layers of plain torch with Transformer Engine's module tree and parameter names.

A model built from them has the parameter names of one built with Transformer Engine, so weight conversion and
checkpoints do not depend on what is installed. Megatron-core's own layers without Transformer Engine differ in their
names, and their norm and attention refuse sequence parallelism and packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional

from polyturn.trainer.megatron.attention import TorchPackedAttention


class TorchNorm(torch.nn.RMSNorm):
    """RMSNorm over the hidden dimension."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_kwargs: Any
    ) -> None:
        assert config.normalization == "RMSNorm", config.normalization
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Under sequence parallelism every rank sees its own tokens: Megatron-core sums such gradients over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchHeadNorm(TorchNorm):
    """RMSNorm of queries or keys, whose gradients Megatron-core sums over the tensor-parallel ranks by their names."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, eps, **kwargs)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]


class TorchNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and the column-parallel linear layer behind it as one module, as Transformer Engine fuses them."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        assert config.normalization == "RMSNorm", config.normalization
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        normed = functional.rms_norm(
            input_, input_.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon
        )
        return super().forward(normed, weight, runtime_gather_output)


class TorchSpecProvider(LocalSpecProvider):
    """Tells Megatron-core's spec functions which module to use for what."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return TorchNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        del rms_norm
        return TorchHeadNorm if for_qk else TorchNorm

    def core_attention(self) -> type:
        return TorchPackedAttention


def torch_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The decoder of a dense model, every layer alike."""
    backend = TorchSpecProvider()
    head_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_layer_norm_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=get_mlp_module_spec_for_backend(backend=backend),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * config.num_layers, layer_norm=backend.layer_norm()
    )
