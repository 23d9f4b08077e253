"""Modules of plain torch with Transformer Engine's module tree and parameter names.

A model built from them has the parameter names of one built with Transformer Engine, so weight conversion and
checkpoints do not depend on what is installed. Megatron-core's own layers without Transformer Engine differ in their
names, and their norm and attention refuse sequence parallelism and packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
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
