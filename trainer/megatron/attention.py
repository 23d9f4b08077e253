"""Causal attention over packed sequences with torch's own kernel, on any device.

A pack is a row of sequences of different lengths. Sequences of like length are stacked into padded batches and each
batch is one kernel call. Padding lies behind a sequence's own tokens, so the causal order alone keeps it, and every
other sequence, out of sight: no mask is built.

Context-parallel ranks share the tokens of a pack. Each sequence is cut into 2 x size chunks of one length, and rank r
holds the chunks r and 2 x size - 1 - r, one from each end: with causal attention, where later tokens look at more
keys, every rank then has the same work. This is the order of Transformer Engine's packed (THD) layout, which
Megatron-core's rotary embeddings follow, too. A rank collects the keys and values of the others, and each of its
chunks looks at the keys up to its own end, `QUERY_BLOCK` queries at a time: the mask of a block is a view of one mask
of so many rows, so that memory grows with the tokens and not with their square.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from polyturn.trainer.data.prefix_tree import Sharing


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextSlice:
    """Which part of each sequence a rank holds."""

    size: int = 1
    rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        """What the length of every sequence must be a multiple of."""
        return 2 * self.size if self.size > 1 else 1

    def chunk_length(self, length: int) -> int:
        """Of a sequence of this (padded) length."""
        num_chunks = 2 * self.size
        assert length % num_chunks == 0, (
            f"a sequence of {length} tokens does not divide into {num_chunks} chunks"
        )
        return length // num_chunks

    def positions(self, lengths: Sequence[int]) -> torch.Tensor:
        """[T / size]: the place in the pack of each token that this rank holds, given the sequences' lengths."""
        if self.size == 1:
            return torch.arange(sum(lengths))
        parts: list[torch.Tensor] = []
        start = 0
        for length in lengths:
            chunk = self.chunk_length(length)
            for number in (self.rank, 2 * self.size - 1 - self.rank):
                parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
            start += length
        return torch.cat(parts)


def whole_order(lengths: Sequence[int], size: int) -> torch.Tensor:
    """[T]: where each token of the pack lies when the ranks' tokens stand one rank behind the other."""
    gathered = torch.cat([ContextSlice(size=size, rank=rank).positions(lengths) for rank in range(size)])
    return gathered.argsort()


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, own: torch.Tensor, num_rows: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.save_for_backward(own)
        # Every row is one rank's, so the sum only ever adds zeros.
        spread = values.new_zeros(num_rows, *values.shape[1:])
        spread.index_copy_(0, own, values)
        dist.all_reduce(spread, group=group)
        return spread

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (own,) = ctx.saved_tensors
        return grad.index_select(0, own), None, None, None


def spread_rows(
    values: torch.Tensor, own: torch.Tensor, num_rows: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Values [M, ...] of this rank's rows -> those of all rows [N, ...], the same on every rank of the group.

    Each rank goes on to compute the same loss of all rows; the gradient flows back into its own alone, so that the sum
    of the ranks' gradients is the gradient of one loss.

    Args:
        own: [M]: which of the N rows are this rank's. Every row is exactly one rank's.
    """
    return _Spread.apply(values, own, num_rows, group)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkBatch:
    """Chunks of one length with keys of one length, which one kernel call can attend."""

    queries: torch.Tensor
    """[chunks * length]: places among this rank's tokens."""
    keys: torch.Tensor
    """[chunks * key length]: places in the whole pack."""
    num_chunks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextLayout:
    """How a context-parallel rank attends its part of a pack of T tokens."""

    whole_order: torch.Tensor
    """[T]: where a token of the pack lies among those collected from all ranks."""
    batches: tuple[ChunkBatch, ...]
    scatter: torch.Tensor
    """[T / size]: where the output of each of this rank's tokens lies among those of all batches."""


def lay_out_context(lengths: list[int], part: ContextSlice) -> ContextLayout:
    """Pair each chunk of this rank with the keys that it may see. Sequences of one length share their batches."""
    starts = [0, *itertools.accumulate(lengths)][:-1]
    by_length: dict[int, list[int]] = {}
    for start, length in zip(starts, lengths, strict=True):
        by_length.setdefault(length, []).append(start)
    batches: list[ChunkBatch] = []
    for length, sequences in by_length.items():
        chunk = part.chunk_length(length)
        firsts = torch.tensor(sequences)[:, None]
        # This rank's tokens of a sequence begin where the pack's would if each held a size-th of it.
        own = firsts // part.size
        for place, number in enumerate((part.rank, 2 * part.size - 1 - part.rank)):
            queries = own + torch.arange(place * chunk, (place + 1) * chunk)
            keys = firsts + torch.arange((number + 1) * chunk)
            batches.append(
                ChunkBatch(queries=queries.flatten(), keys=keys.flatten(), num_chunks=len(sequences))
            )
    return ContextLayout(
        whole_order=whole_order(lengths, part.size),
        batches=tuple(batches),
        scatter=torch.cat([batch.queries for batch in batches]).argsort(),
    )


QUERY_BLOCK = 128
"""Queries of one kernel call where a chunk has more keys than queries."""


def block_mask(num_keys: int, query: torch.Tensor) -> torch.Tensor:
    """[QUERY_BLOCK, num_keys], what is added to scores: 0, and -inf where one of the last queries would see a later
    key. In the queries' dtype, or torch would make such a mask of each of its views, and keep it for the backward pass.
    """
    mask = torch.zeros(QUERY_BLOCK, num_keys, dtype=query.dtype, device=query.device)
    later = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=query.device).triu(1)
    mask[:, -QUERY_BLOCK:].masked_fill_(later[:, -num_keys:], -math.inf)
    return mask


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-core's description of a pack, with its layout for this attention made once for all layers."""

    lengths: list[int] = field(default_factory=list)
    """Of the whole sequences, padding included, whatever part of them this rank holds."""
    part: ContextSlice = field(default_factory=ContextSlice)
    attend: Callable[..., torch.Tensor] | None = None
    """(query, key, value, scale=...) -> the output, in place of this module's own ways."""
    sharing: Sharing | None = None
    """Where prefixes are shared, what that saves."""
    _mask: torch.Tensor | None = None

    def mask_like(self, query: torch.Tensor) -> torch.Tensor:
        """[QUERY_BLOCK, longest sequence]: `block_mask` for all layers, in the queries' dtype."""
        if self._mask is None or self._mask.dtype != query.dtype:
            self._mask = block_mask(max(self.lengths), query)
        return self._mask

    @cached_property
    def context_layout(self) -> ContextLayout:
        assert self.cu_seqlens_q is not None
        layout = lay_out_context(self.lengths, self.part)
        device = self.cu_seqlens_q.device
        return ContextLayout(
            whole_order=layout.whole_order.to(device),
            batches=tuple(
                replace(batch, queries=batch.queries.to(device), keys=batch.keys.to(device))
                for batch in layout.batches
            ),
            scatter=layout.scatter.to(device),
        )

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


def pack_lengths(
    lengths: list[int], device: torch.device, part: ContextSlice | None = None
) -> PackedSequences:
    """Describe a pack of sequences of these `lengths`, of which this rank holds a part."""
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    longest = max(lengths)
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=list(lengths),
        part=part or ContextSlice(),
    )


class TorchPackedAttention(MegatronModule):
    """`core_attention` of a layer: query [T, heads, dim], key and value [T, groups, dim] -> [T, heads * dim].

    T are the tokens of this rank, 1/size of the pack under context parallelism.
    """

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
        if packed_seq_params.attend is not None:
            return packed_seq_params.attend(query, key, value, scale=self.scale)
        if packed_seq_params.part.size > 1:
            return self._attend_chunks(query, key, value, packed_seq_params)
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

    def _attend_chunks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequences: PackedSequences
    ) -> torch.Tensor:
        """Keys and values are collected in one piece; in the backward pass their gradients are summed and split."""
        layout, mask = sequences.context_layout, sequences.mask_like(query)
        widths = (key.size(-2) * key.size(-1), value.size(-2) * value.size(-1))
        both = torch.cat([key.flatten(1), value.flatten(1)], -1)
        whole = gather_from_sequence_parallel_region(both, group=parallel_state.get_context_parallel_group())
        whole_key, whole_value = whole.index_select(0, layout.whole_order).split(widths, -1)
        outputs = [
            self._attend(
                query.index_select(0, batch.queries),
                whole_key.index_select(0, batch.keys).unflatten(-1, key.shape[-2:]),
                whole_value.index_select(0, batch.keys).unflatten(-1, value.shape[-2:]),
                batch.num_chunks,
                len(batch.queries) // batch.num_chunks,
                mask=mask,
            )
            for batch in layout.batches
        ]
        return torch.cat(outputs).index_select(0, layout.scatter)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_sequences: int,
        length: int,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One batch: query [sequences * length, heads, dim] -> [sequences * length, heads * dim].

        There may be more keys than queries in a sequence: the queries are those at its end, and there is a mask.
        """
        query, key, value = (
            x.reshape(num_sequences, -1, x.size(-2), x.size(-1)).transpose(1, 2) for x in (query, key, value)
        )
        if key.size(2) == length:
            output = self._attend_block(query, key, value, None)
        else:
            assert mask is not None
            output = self._attend_blocks(query, key, value, mask)
        return output.transpose(1, 2).reshape(num_sequences * length, -1)

    def _attend_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """query [sequences, heads, length, dim] of the places at the end of the keys -> [..., length, dim]."""
        length, num_keys = query.size(2), key.size(2)
        outputs = []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            seen = num_keys - length + end
            # The last rows and columns of the mask are those of the block's last queries and the keys that they see.
            outputs.append(
                self._attend_block(
                    query[:, :, start:end],
                    key[:, :, :seen],
                    value[:, :, :seen],
                    mask[start - end :, mask.size(1) - seen :],
                )
            )
        return torch.cat(outputs, 2)

    def _attend_block(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
