"""Causal attention over packed sequences with torch's own kernel, on any device.

A pack is a row of sequences of different lengths. Sequences of like length are stacked into padded batches and each
batch is one kernel call. Padding lies behind a sequence's own tokens, so the causal order alone keeps it, and every
other sequence, out of sight: no mask is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

MAX_PADDING = 0.15
"""Share of padded positions up to which a shorter sequence joins a batch of longer ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackLayout:
    """Where the tokens of a pack lie in its padded batches.

    With `T` packed tokens and `P` positions in all batches: `gather` [P] gives the packed token of a position (padding
    repeats the first token of its sequence), `scatter` [T] the position of a packed token, and `shapes` the (sequences,
    length) of each batch, in order.
    """

    gather: torch.Tensor
    scatter: torch.Tensor
    shapes: tuple[tuple[int, int], ...]
    is_identity: bool
    """The batches side by side are the pack itself."""


def lay_out(lengths: list[int]) -> PackLayout:
    """Group the sequences of a pack, given their `lengths` in order, into padded batches."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    num_real = 0
    for i in order:
        if batches:
            longest = lengths[batches[-1][0]]
            num_positions = longest * (len(batches[-1]) + 1)
            if num_real + lengths[i] >= (1 - MAX_PADDING) * num_positions:
                batches[-1].append(i)
                num_real += lengths[i]
                continue
        batches.append([i])
        num_real = lengths[i]
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1].tolist()
    gather: list[torch.Tensor] = []
    scatter = torch.empty(sum(lengths), dtype=torch.long)
    position = 0
    for batch in batches:
        length = lengths[batch[0]]
        for i in batch:
            row = torch.full((length,), starts[i])
            row[: lengths[i]] = torch.arange(starts[i], starts[i] + lengths[i])
            gather.append(row)
            scatter[starts[i] : starts[i] + lengths[i]] = torch.arange(position, position + lengths[i])
            position += length
    gathered = torch.cat(gather)
    return PackLayout(
        gather=gathered,
        scatter=scatter,
        shapes=tuple((len(batch), lengths[batch[0]]) for batch in batches),
        is_identity=len(gathered) == len(scatter) and bool((gathered == torch.arange(len(gathered))).all()),
    )


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-core's description of a pack, with its layout for this attention made once for all layers."""

    lengths: list[int] = field(default_factory=list)

    @cached_property
    def layout(self) -> PackLayout:
        assert self.cu_seqlens_q is not None
        layout = lay_out(self.lengths)
        device = self.cu_seqlens_q.device
        return PackLayout(
            gather=layout.gather.to(device),
            scatter=layout.scatter.to(device),
            shapes=layout.shapes,
            is_identity=layout.is_identity,
        )


def pack_lengths(lengths: list[int], device: torch.device) -> PackedSequences:
    """Describe a pack of sequences of these `lengths`."""
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=list(lengths),
    )


class TorchPackedAttention(MegatronModule):
    """`core_attention` of a layer: query [T, heads, dim], key and value [T, groups, dim] -> [T, heads * dim]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self", (
            attn_mask_type,
            attention_type,
        )
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism needs Transformer Engine's attention")
        if (config.attention_dropout if attention_dropout is None else attention_dropout) > 0:
            raise ValueError("attention_dropout must be 0: the trainer must repeat what the engine computed")
        if config.window_size is not None:
            raise ValueError("sliding-window attention needs Transformer Engine's attention")
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None and attention_bias is None
        assert attn_mask_type in (None, AttnMaskType.causal, AttnMaskType.padding_causal), attn_mask_type
        assert isinstance(packed_seq_params, PackedSequences), "this attention runs on packed sequences only"
        layout = packed_seq_params.layout
        if not layout.is_identity:
            query, key, value = (x.index_select(0, layout.gather) for x in (query, key, value))
        sizes = [num_sequences * length for num_sequences, length in layout.shapes]
        outputs = [
            self._attend(q, k, v, *shape)
            for q, k, v, shape in zip(
                query.split(sizes), key.split(sizes), value.split(sizes), layout.shapes, strict=True
            )
        ]
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output if layout.is_identity else output.index_select(0, layout.scatter)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_sequences: int, length: int
    ) -> torch.Tensor:
        """One padded batch: [sequences * length, heads, dim] -> [sequences * length, heads * dim]."""
        query, key, value = (
            x.reshape(num_sequences, length, x.size(-2), x.size(-1)).transpose(1, 2)
            for x in (query, key, value)
        )
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=query.size(1) != key.size(1)
        )
        return output.transpose(1, 2).reshape(num_sequences * length, -1)
