"""Hugging Face weights into a Megatron-core model and out of it, bit for bit.

A family's rows (`families.mapping`) say where each Megatron parameter comes from, how its Hugging Face tensors are
joined, and along which dimension tensor parallelism splits it. Here they are applied to the part of a model that a
rank holds: some layers of it (pipeline stages), some experts (expert parallelism), and a slice of what remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from polyturn.trainer.megatron.model import Architecture
from polyturn.trainer.megatron.process_groups import raise_on_all
from polyturn.trainer.models.hf_directory import HFWeights
from polyturn.trainer.models.weight_files import EMBEDDING, OUTPUT, check_tensors
from polyturn.trainer.models.weight_mapping import Mapped, find_row

OUTPUT_WEIGHT = "output_layer.weight"
EMBEDDING_WEIGHT = "embedding.word_embeddings.weight"
EXPERT_BIAS = "expert_bias"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A Megatron tensor of this rank and its place in the whole model."""

    name: str
    """In its chunk, as Megatron names it."""
    mapped: Mapped
    """With the numbers that layer and expert have in the whole model."""
    tensor: torch.Tensor


def chunk_mapping(chunk: GPTModel, architecture: Architecture) -> Callable[[str], Mapped]:
    """Finds the row of a parameter of this chunk by its name in the chunk."""
    config = chunk.config
    layer_offset = get_transformer_layer_offset(config, vp_stage=chunk.vp_stage)
    num_local = (config.num_moe_experts or 0) // config.expert_model_parallel_size
    expert_offset = num_local * parallel_state.get_expert_model_parallel_rank()
    rows = dict(architecture.family.rows)
    if architecture.tied_embeddings:
        # Where the last pipeline stage is not the first, it holds a copy.
        rows[OUTPUT_WEIGHT] = rows[EMBEDDING_WEIGHT]
    return lambda name: find_row(rows, name, layer_offset=layer_offset, expert_offset=expert_offset)


def locate_tensors(chunks: Sequence[GPTModel], architecture: Architecture) -> Iterator[Located]:
    """The parameters of this rank's chunks, and the corrections of its routers, which are trained by nobody."""
    for chunk in chunks:
        mapping = chunk_mapping(chunk, architecture)
        for name, param in chunk.named_parameters():
            yield Located(name=name, mapped=mapping(name), tensor=param)
        for name, buffer in chunk.named_buffers():
            if name.endswith(EXPERT_BIAS):
                yield Located(name=name, mapped=mapping(name), tensor=buffer)


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
    if mapped.join == "copy" or (len(mapped.hf_names) == 1 and mapped.join == "gate_up"):
        return [tensor]
    if mapped.join == "gate_up":
        return list(tensor.chunk(2))
    if mapped.join == "vocab":
        return [tensor[: architecture.vocab_size]]
    groups, head = config.num_query_groups, config.kv_channels
    queries = config.num_attention_heads // groups
    grouped = tensor.view(groups, queries + 2, head, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in grouped.split([queries, 1, 1], 1)]


def _split_group(mapped: Mapped) -> dist.ProcessGroup:
    """The ranks that hold the slices of a tensor."""
    if mapped.is_expert:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def take_slice(mapped: Mapped, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a full Megatron tensor."""
    group = _split_group(mapped)
    size, rank = group.size(), group.rank()
    if size == 1 or mapped.split_dim is None:
        return tensor
    if mapped.join == "gate_up":
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, mapped.split_dim)[rank]


def gather_slices(mapped: Mapped, tensor: torch.Tensor) -> torch.Tensor:
    """The full Megatron tensor of the ranks' parts: the inverse of `take_slice`, collective over tensor parallelism."""
    group = _split_group(mapped)
    if group.size() == 1 or mapped.split_dim is None:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    if mapped.join == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(parts, mapped.split_dim)


def mark_split_params(chunks: Sequence[GPTModel], architecture: Architecture) -> None:
    """Tell Megatron-core which parameters which kind of parallelism splits.

    Its layers say so only where they also draw random weights. Unmarked ones pass for copies, and the gradient norm
    would count one rank's part alone. It also takes experts for weights like any other unless expert parallelism
    splits them; but without it, too, they are copied over other ranks than the rest where tensor parallelism does not
    treat both alike. Must run before the model is wrapped for data parallelism.
    """
    config = chunks[0].config
    experts_differ = (
        config.expert_model_parallel_size > 1
        or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )
    for located in locate_tensors(chunks, architecture):
        param, split_dim = located.tensor, located.mapped.split_dim
        param.tensor_model_parallel = split_dim is not None  # type: ignore[attr-defined]
        param.partition_dim = -1 if split_dim is None else split_dim  # type: ignore[attr-defined]
        param.partition_stride = 1  # type: ignore[attr-defined]
        if located.mapped.is_expert:
            param.allreduce = not experts_differ  # type: ignore[attr-defined]


@torch.no_grad()
def load_hf_weights(chunks: Sequence[GPTModel], architecture: Architecture, weights: HFWeights) -> None:
    """Fill this rank's part of the model. Each rank reads what it needs, and all learn of what any of them finds.

    Raises:
        ValueError: a tensor is missing, superfluous, damaged, or of another shape than the config says; on all ranks.
    """
    _keep_corrections_in_float32(chunks)
    config = chunks[0].config
    fault = None
    try:
        check_tensors(weights.stored, architecture.shape, source=weights.directory, without=weights.without)
        if architecture.tied_embeddings:
            _check_tied(weights)
        for located in locate_tensors(chunks, architecture):
            parts = [weights[name] for name in located.mapped.hf_names]
            full = join_tensors(located.mapped, parts, config, architecture)
            located.tensor.copy_(take_slice(located.mapped, full))
    except ValueError as error:
        fault = str(error)
    raise_on_all(fault)


def _check_tied(weights: HFWeights) -> None:
    """An output layer beside embeddings that config.json ties to it must be these."""
    if OUTPUT in weights and not torch.equal(weights[OUTPUT], weights[EMBEDDING]):
        raise ValueError(
            f"{weights.stored[OUTPUT].path}: {OUTPUT} differs from {EMBEDDING}, and config.json has "
            "tie_word_embeddings=true: set it to false if the output layer is a weight of its own, or delete it"
        )


def _keep_corrections_in_float32(chunks: Sequence[GPTModel]) -> None:
    """A model made bfloat16 has rounded them, and the choice among near-equal experts with them."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                module._maintain_float32_expert_bias()


@torch.no_grad()
def named_hf_tensors(
    chunks: Sequence[GPTModel], architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor, whole, on every rank, in the same order on all: each rank goes through it to its end.

    Collective over the tensor-, expert- and pipeline-parallel groups; the data-parallel copies do the same beside each
    other. One Megatron tensor at a time is gathered (of experts, one of each expert-parallel rank), so the memory that
    it takes is that of the largest. A tensor may be a view of the weight itself, to be read before the next update.
    """
    config = chunks[0].config
    own_headers = _headers(_locate_own(chunks, architecture))
    device = next(chunks[0].named_parameters())[1].device
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    for stage, headers in enumerate(_gather_objects(own_headers, pipeline)):
        located = _locate_own(chunks, architecture) if stage == pipeline.rank() else iter(())
        for header in headers:
            if stage == pipeline.rank():
                parts = _gather_whole(next(located), header)
            else:
                parts = [torch.empty(header.shape, dtype=header.dtype, device=device) for _ in header.mapped]
            for mapped, part in zip(header.mapped, parts, strict=True):
                if pipeline.size() > 1:
                    dist.broadcast(part, group_src=stage, group=pipeline)
                yield from zip(mapped.hf_names, split_tensor(mapped, part, config, architecture), strict=True)


def _locate_own(chunks: Sequence[GPTModel], architecture: Architecture) -> Iterator[Located]:
    """Without the last stage's copy of a tied embedding."""
    for located in locate_tensors(chunks, architecture):
        if not (architecture.tied_embeddings and located.name == OUTPUT_WEIGHT):
            yield located


@dataclass(frozen=True, kw_only=True, slots=True)
class _Header:
    """What the ranks of other pipeline stages must know of a Megatron tensor to receive it."""

    mapped: tuple[Mapped, ...]
    """Of an expert: its row and those of the experts in its place on the other expert-parallel ranks."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype


def _headers(located: Iterator[Located]) -> list[_Header]:
    own = [(item.mapped, tuple(item.tensor.shape), item.tensor.dtype) for item in located]
    by_rank = _gather_objects(
        [mapped for mapped, _, _ in own], parallel_state.get_expert_model_parallel_group()
    )
    headers = []
    for index, (mapped, part_shape, dtype) in enumerate(own):
        shape = list(part_shape)
        if mapped.split_dim is not None:
            shape[mapped.split_dim] *= _split_group(mapped).size()
        headers.append(
            _Header(
                mapped=tuple(rows[index] for rows in by_rank) if mapped.is_expert else (mapped,),
                shape=tuple(shape),
                dtype=dtype,
            )
        )
    return headers


def _gather_whole(located: Located, header: _Header) -> list[torch.Tensor]:
    """A tensor of this rank, or the experts that the expert-parallel ranks hold in its place."""
    whole = gather_slices(located.mapped, located.tensor.detach())
    if len(header.mapped) == 1:
        return [whole]
    parts = [torch.empty_like(whole) for _ in header.mapped]
    dist.all_gather(parts, whole.contiguous(), group=parallel_state.get_expert_model_parallel_group())
    return parts


def _gather_objects(mine: T, group: dist.ProcessGroup) -> list[T]:
    """What each rank of a group has, in the order of the ranks."""
    if group.size() == 1:
        return [mine]
    parts: list[T] = [mine] * group.size()
    dist.all_gather_object(parts, mine, group=group)
    return parts
