"""The layers of a model as Megatron-core's specs: Transformer Engine's modules, or torch's under the same names.

A model built from plain torch has the parameter names of one built with Transformer Engine, so weight conversion and
checkpoints do not depend on what is installed. Megatron-core's own layers without Transformer Engine differ in their
names, and their norm and attention refuse sequence parallelism and packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import megatron.core.transformer.multi_latent_attention as latent_attention
import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_mlp_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
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
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        normed = functional.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight, self.eps)
        return super().forward(normed, weight, runtime_gather_output)


class TorchLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole: the down projections of latent attention."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None = None,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        tp_group: torch.distributed.ProcessGroup | None = None,
        **_kwargs: Any,
    ) -> None:
        super().__init__()
        assert parallel_mode == "duplicated" and not bias and tp_group is None
        self._tp_group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return functional.linear(input_, self.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


class TorchGroupedLinear(torch.nn.Module):
    """One linear layer for each expert of this rank: `weight0`, `weight1`, ..., each [out, in]."""

    split_dim: ClassVar[int]
    """The dimension that expert tensor parallelism splits."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        pg_collection: ProcessGroupCollection,
        **_kwargs: Any,
    ) -> None:
        super().__init__()
        assert not bias, "experts have no biases"
        self.num_gemms = num_gemms
        self._groups = pg_collection
        shape = [output_size, input_size]
        num_parts = pg_collection.expt_tp.size()
        if shape[self.split_dim] % num_parts:
            raise ValueError(
                f"{num_parts} expert-tensor-parallel ranks do not divide an expert's size {shape[self.split_dim]}"
            )
        shape[self.split_dim] //= num_parts
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            if config.perform_initialization:
                init_method(weight)
            self.register_parameter(f"weight{i}", weight)

    def forward(self, tokens: torch.Tensor, num_tokens: list[int]) -> tuple[torch.Tensor, None]:
        """Tokens [T, in] sorted by expert, `num_tokens` of each -> [T, out]."""
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        outputs = [
            functional.linear(part, weight)
            for part, weight in zip(tokens.split(num_tokens), weights, strict=True)
        ]
        return torch.cat(outputs), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """All experts of a layer as one tensor [experts, out, in] under the keys of Transformer Engine's module."""
        expert_group = self._groups.ep
        first = expert_group.rank() * self.num_gemms
        num_experts = expert_group.size() * self.num_gemms
        shards = {}
        for i in range(self.num_gemms):
            shard = make_sharded_tensors_for_checkpoint(
                {f"{i}.weight": getattr(self, f"weight{i}")},
                "",
                {f"{i}.weight": self.split_dim},
                (*sharded_offsets, (len(sharded_offsets), first + i, num_experts)),
                tp_group=self._groups.expt_tp,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
            replace_prefix_for_sharding(shard, f"{i}.", prefix)
            tensor = shard[f"{i}.weight"]
            tensor.replica_id = (*tensor.replica_id[:2], self._groups.expt_dp.rank())
            shards[f"{prefix}weight{i}"] = tensor
        return shards


class TorchGroupedColumnLinear(TorchGroupedLinear):
    split_dim = 0


class TorchGroupedRowLinear(TorchGroupedLinear):
    split_dim = 1


class TorchSpecProvider(LocalSpecProvider):
    """Tells Megatron-core's spec functions which module to use for what."""

    def linear(self) -> type:
        return TorchLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return TorchNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        del rms_norm
        return TorchHeadNorm if for_qk else TorchNorm

    def core_attention(self) -> type:
        return TorchPackedAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        assert moe_use_grouped_gemm and not moe_use_legacy_grouped_gemm
        return TEGroupedMLP, MLPSubmodules(
            linear_fc1=TorchGroupedColumnLinear, linear_fc2=TorchGroupedRowLinear
        )


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
