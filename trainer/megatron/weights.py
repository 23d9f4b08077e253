"""Hugging Face weights into a Megatron-core model and out of it, bit for bit.

One table says where each Megatron parameter comes from, how its Hugging Face tensors are joined, and along which
dimension tensor parallelism splits it. A further model family adds rows.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from polyturn.trainer.megatron.model import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapped:
    """How one Megatron parameter is made of Hugging Face tensors."""

    hf_names: tuple[str, ...]
    """`{layer}` stands for the number of the layer."""
    join: Literal["copy", "qkv", "gate_up", "vocab"] = "copy"
    split_dim: int | None = None
    """The dimension that tensor parallelism splits; None: every rank holds all of it."""


_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."

TABLE = {
    "embedding.word_embeddings.weight": Mapped(
        hf_names=("model.embed_tokens.weight",), join="vocab", split_dim=0
    ),
    "output_layer.weight": Mapped(hf_names=("lm_head.weight",), join="vocab", split_dim=0),
    "decoder.final_layernorm.weight": Mapped(hf_names=("model.norm.weight",)),
    "self_attention.linear_qkv.layer_norm_weight": Mapped(
        hf_names=("model.layers.{layer}.input_layernorm.weight",)
    ),
    "self_attention.linear_qkv.weight": Mapped(
        hf_names=tuple(f"{_ATTENTION}{x}_proj.weight" for x in "qkv"), join="qkv", split_dim=0
    ),
    "self_attention.linear_qkv.bias": Mapped(
        hf_names=tuple(f"{_ATTENTION}{x}_proj.bias" for x in "qkv"), join="qkv", split_dim=0
    ),
    "self_attention.q_layernorm.weight": Mapped(hf_names=(f"{_ATTENTION}q_norm.weight",)),
    "self_attention.k_layernorm.weight": Mapped(hf_names=(f"{_ATTENTION}k_norm.weight",)),
    "self_attention.linear_proj.weight": Mapped(hf_names=(f"{_ATTENTION}o_proj.weight",), split_dim=1),
    "mlp.linear_fc1.layer_norm_weight": Mapped(
        hf_names=("model.layers.{layer}.post_attention_layernorm.weight",)
    ),
    "mlp.linear_fc1.weight": Mapped(
        hf_names=(f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"), join="gate_up", split_dim=0
    ),
    "mlp.linear_fc2.weight": Mapped(hf_names=(f"{_MLP}down_proj.weight",), split_dim=1),
}
"""Megatron's names (of a layer's parameters: the part after `decoder.layers.N.`)."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def find_mapping(name: str) -> Mapped:
    """The table's row for a Megatron parameter, with the layer's number filled in."""
    match = _LAYER.fullmatch(name)
    layer, key = match.groups() if match else ("", name)
    assert key in TABLE, f"no Hugging Face name is known for {name}"
    row = TABLE[key]
    return Mapped(
        hf_names=tuple(hf_name.format(layer=layer) for hf_name in row.hf_names),
        join=row.join,
        split_dim=row.split_dim,
    )


def join_tensors(
    mapped: Mapped, tensors: list[torch.Tensor], config: TransformerConfig, architecture: Architecture
) -> torch.Tensor:
    """Hugging Face tensors -> the full Megatron tensor.

    Megatron lays queries, keys and values out group by group ([groups, queries of the group + 2, head, ...]), and pads
    the vocabulary with rows of zeros.
    """
    if mapped.join == "copy":
        return tensors[0]
    if mapped.join == "gate_up":
        return torch.cat(tensors)
    if mapped.join == "vocab":
        num_missing = architecture.padded_vocab_size - tensors[0].size(0)
        return torch.cat([tensors[0], tensors[0].new_zeros(num_missing, tensors[0].size(1))])
    groups, head = config.num_query_groups, config.kv_channels
    grouped = [tensor.reshape(groups, -1, head, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(grouped, 1).reshape(-1, *tensors[0].shape[1:])


def split_tensor(
    mapped: Mapped, tensor: torch.Tensor, config: TransformerConfig, architecture: Architecture
) -> list[torch.Tensor]:
    """The full Megatron tensor -> its Hugging Face tensors: the inverse of `join_tensors`."""
    if mapped.join == "copy":
        return [tensor]
    if mapped.join == "gate_up":
        return list(tensor.chunk(2))
    if mapped.join == "vocab":
        return [tensor[: architecture.vocab_size]]
    groups, head = config.num_query_groups, config.kv_channels
    queries = config.num_attention_heads // groups
    grouped = tensor.view(groups, queries + 2, head, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in grouped.split([queries, 1, 1], 1)]


def take_slice(mapped: Mapped, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full Megatron tensor."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    if size == 1 or mapped.split_dim is None:
        return tensor
    if mapped.join == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, mapped.split_dim)[rank]


def gather_slices(mapped: Mapped, tensor: torch.Tensor) -> torch.Tensor:
    """The full Megatron tensor of the ranks' parts: the inverse of `take_slice`, collective over tensor parallelism."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1 or mapped.split_dim is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    if mapped.join == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(parts, mapped.split_dim)


def mark_split_params(model: GPTModel) -> None:
    """Tell Megatron-core which parameters tensor parallelism splits.

    Its layers say so only where they also draw random weights. Unmarked ones pass for copies, and the gradient norm
    would count one rank's part alone. Must run before the optimizer is built.
    """
    for name, param in model.named_parameters():
        split_dim = find_mapping(name).split_dim
        param.tensor_model_parallel = split_dim is not None  # type: ignore[attr-defined]
        param.partition_dim = -1 if split_dim is None else split_dim  # type: ignore[attr-defined]
        param.partition_stride = 1  # type: ignore[attr-defined]


@torch.no_grad()
def load_hf_weights(model: GPTModel, architecture: Architecture, weights: Mapping[str, torch.Tensor]) -> None:
    """Fill the model of this rank.

    Raises:
        ValueError: a tensor is missing, superfluous, or of another shape than the config says.
    """
    unused = set(weights)
    for name, param in model.named_parameters():
        mapped = find_mapping(name)
        missing = [hf_name for hf_name in mapped.hf_names if hf_name not in weights]
        if missing:
            raise ValueError(f"the model's safetensors lack {missing[0]}, which its config.json calls for")
        full = join_tensors(
            mapped, [weights[hf_name] for hf_name in mapped.hf_names], model.config, architecture
        )
        part = take_slice(mapped, full)
        if part.shape != param.shape:
            raise ValueError(
                f"{', '.join(mapped.hf_names)}: the config asks for {tuple(param.shape)} on each rank, "
                f"the safetensors give {tuple(part.shape)}"
            )
        param.copy_(part)
        unused.difference_update(mapped.hf_names)
    if architecture.tied_embeddings:
        unused.discard("lm_head.weight")
    if unused:
        raise ValueError(
            f"the model's safetensors hold {min(unused)}, for which its config.json has no place"
        )


@torch.no_grad()
def named_hf_tensors(model: GPTModel, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor, whole, on every rank: collective over tensor parallelism, in the same order on all."""
    for name, param in model.named_parameters():
        mapped = find_mapping(name)
        full = gather_slices(mapped, param.detach())
        yield from zip(mapped.hf_names, split_tensor(mapped, full, model.config, architecture), strict=True)
