"""Causal attention over a tree of prefixes, block by block and without a mask.

In a tree laid out depth first the descendants of a node are one range behind it. So all blocks that attention needs are
of two kinds: each node on itself, causally, and all descendants of a node on the whole of it. Each is one call of
torch's fused kernel on views of the packed tensors. What a token gathers from its blocks is put together by their
log-sum-exp, and the backward pass runs block by block with the whole's output and log-sum-exp (as in ring attention,
arXiv 2310.01889), so that the result is exact and nothing that is not needed is computed, stored or copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch.nn import functional

from polyturn.trainer.data.prefix_tree import Node, PrefixTree, Sharing
from polyturn.trainer.megatron.attention import PackedSequences, TorchPackedAttention


@dataclass
class TreeSequences(PackedSequences):
    """A pack that is a forest of T tokens. To Megatron-core it is one sequence of them."""

    positions: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """[T]: of each token in the samples that it is of, which its rotary embedding follows."""


def describe_tree(tree: PrefixTree, device: torch.device, sharing: Sharing | None = None) -> TreeSequences:
    """The tree as the layers take it.

    Args:
        sharing: None takes that of the tree, which counts what fills it up.
    """
    length = tree.num_tokens
    boundaries = torch.tensor([0, length], dtype=torch.int32, device=device)
    # What a rotary embedding is computed for: positions, not tokens.
    longest = int(tree.positions.max()) + 1
    return TreeSequences(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=[length],
        attend=partial(attend_tree, nodes=tree.nodes),
        positions=torch.from_numpy(tree.positions).to(device),
        sharing=tree.sharing if sharing is None else sharing,
    )


def attend_tree(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, nodes: tuple[Node, ...], scale: float
) -> torch.Tensor:
    """Query [T, heads, d], key [T, groups, d], value [T, groups, e] -> [T, heads * e].

    Heads are a multiple of groups. Values narrower than keys, as latent attention has them, are widened by zeros.
    """
    width = value.size(-1)
    if width < query.size(-1):
        value = functional.pad(value, (0, query.size(-1) - width))
    output = _TreeAttention.apply(query, key, value, nodes, scale)
    return output[..., :width].flatten(1)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        nodes: tuple[Node, ...],
        scale: float,
    ) -> torch.Tensor:
        kernel = _kernel(query)
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(*query.shape[:2], value.size(-1), dtype=wide, device=query.device)
        lse = torch.empty(query.size(1), query.size(0), dtype=wide, device=query.device)
        for rows, columns, causal in _blocks(nodes):
            part, part_lse = kernel.forward(query[rows], key[columns], value[columns], causal, scale)
            if causal:
                output[rows], lse[:, rows] = part.to(wide), part_lse.to(wide)
            else:
                _merge(output[rows], lse[:, rows], part, part_lse)
        result = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, lse)
        ctx.nodes, ctx.scale = nodes, scale
        return result

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        kernel = _kernel(query)
        grad = grad.contiguous()
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros_like(x, dtype=wide) for x in (query, key, value)]
        for rows, columns, causal in _blocks(ctx.nodes):
            parts = kernel.backward(
                grad[rows],
                query[rows],
                key[columns],
                value[columns],
                output[rows],
                lse[:, rows],
                causal,
                ctx.scale,
            )
            for whole, place, part in zip(grads, (rows, columns, columns), parts, strict=True):
                whole[place] += part
        dtypes = (query.dtype, key.dtype, value.dtype)
        grad_query, grad_key, grad_value = (x.to(dtype) for x, dtype in zip(grads, dtypes, strict=True))
        return grad_query, grad_key, grad_value, None, None


def _blocks(nodes: tuple[Node, ...]) -> Iterator[tuple[slice, slice, bool]]:
    """Queries, keys and whether they are causal: each node on itself first, then descendants on their ancestors."""
    for node in nodes:
        yield slice(node.start, node.end), slice(node.start, node.end), True
    for node in nodes:
        if node.descendants_end > node.end:
            yield slice(node.end, node.descendants_end), slice(node.start, node.end), False


def _merge(output: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Take another block into what has been gathered: output [L, heads, e] and log-sum-exp [heads, L], in place."""
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    output.mul_((lse - total).exp().t()[..., None]).addcmul_(
        part.to(output.dtype), (part_lse - total).exp().to(output.dtype).t()[..., None]
    )
    lse.copy_(total)


class _Kernel:
    """One block: query [L, heads, d] on key and value [K, groups, d], all of them views."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [L, heads, d] and the log-sum-exp of the scores [heads, L]."""
        raise NotImplementedError

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The block's part of the gradients to query, key and value, given the whole's output and log-sum-exp."""
        raise NotImplementedError


class _CPUKernel(_Kernel):
    """torch's flash attention for CPUs: any float type, grouped queries."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_by_head, (query, key, value)), 0.0, causal, scale=scale
        )
        return _by_token(output), lse[0]

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = [_by_head(x) for x in (grad, query, key, value, output)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, lse[None].contiguous(), 0.0, causal, scale=scale
        )
        return tuple(map(_by_token, grads))  # type: ignore[return-value]


class _FlashKernel(_Kernel):
    """torch's flash attention for GPUs: half precision, grouped queries."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            *map(_by_head, (query, key, value)), 0.0, causal, scale=scale
        )
        return _by_token(output), lse[0, :, : len(query)]

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = [_by_head(x) for x in (grad, query, key, value, output)]
        unused = torch.empty(2, dtype=torch.uint64, device=query.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *inputs,
            lse[None].contiguous(),
            None,
            None,
            len(query),
            len(key),
            0.0,
            causal,
            unused,
            unused,
            scale=scale,
        )
        return tuple(map(_by_token, grads))  # type: ignore[return-value]


class _PlainKernel(_Kernel):
    """The formulas as they stand, for float32 on GPUs, and to compare the others with."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._scores(query, key, causal, scale)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp()
        return torch.einsum("grlk,kge->lgre", weights, value).flatten(1, 2), lse.flatten(0, 1)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        groups = key.size(1)
        grad, output, grouped = (x.unflatten(1, (groups, -1)) for x in (grad, output, query))
        scores = self._scores(query, key, causal, scale)
        weights = (scores - lse.unflatten(0, (groups, -1))[..., None]).exp()
        grad_value = torch.einsum("grlk,lgre->kge", weights, grad)
        slopes = (
            torch.einsum("lgre,kge->grlk", grad, value) - (grad * output).sum(-1).permute(1, 2, 0)[..., None]
        )
        slopes = slopes * weights * scale
        grad_query = torch.einsum("grlk,kgd->lgrd", slopes, key).flatten(1, 2)
        return grad_query, torch.einsum("grlk,lgrd->kgd", slopes, grouped), grad_value

    def _scores(self, query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
        """[groups, heads of a group, L, K]"""
        scores = scale * torch.einsum("lgrd,kgd->grlk", query.unflatten(1, (key.size(1), -1)), key)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        return scores


def _kernel(query: torch.Tensor) -> _Kernel:
    if query.device.type == "cpu":
        return _CPUKernel()
    return _FlashKernel() if query.dtype in (torch.bfloat16, torch.float16) else _PlainKernel()


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """[L, heads, d] -> [1, heads, L, d]"""
    return x.transpose(0, 1)[None]


def _by_token(x: torch.Tensor) -> torch.Tensor:
    """[1, heads, L, d] -> [L, heads, d]"""
    return x[0].transpose(0, 1)


class TreePositions(torch.nn.Module):
    """A rotary embedding that follows a tree's positions where a pack is a tree, and is as it was where it is not.

    Megatron-core asks for the number of positions right before it asks for their embeddings, and shows the pack with
    the first question: also when a layer is computed again in the backward pass.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._positions: torch.Tensor | None = None

    def get_rotary_seq_len(
        self, context: Any, block: Any, hidden: Any, config: Any, packed: Any = None, **kwargs: Any
    ) -> int:
        self._positions = packed.positions if isinstance(packed, TreeSequences) else None
        length: int = self.inner.get_rotary_seq_len(context, block, hidden, config, packed, **kwargs)  # type: ignore[operator]
        return length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Embeddings, one for each position; with a tree one for each token. Some kinds give a scale with them."""
        found = self.inner(*args, **kwargs)
        if self._positions is None:
            return found
        if isinstance(found, tuple):
            embeddings, *rest = found
            return embeddings.index_select(0, self._positions), *rest
        return found.index_select(0, self._positions)


def allow_trees(model: GPTModel) -> None:
    """Make a model fit for packs that are trees.

    Raises:
        ValueError: its attention is another than this package's.
    """
    if model.config.apply_rope_fusion:
        raise ValueError("trainer.shared_prefix: tree needs megatron.apply_rope_fusion: false")
    for module in list(model.modules()):
        core = getattr(module, "core_attention", None)
        if core is not None and not isinstance(core, TorchPackedAttention):
            raise ValueError(
                f"trainer.shared_prefix: tree needs the attention of the torch layers, and this model has "
                f"{type(core).__name__}; use `group`, which computes samples one by one"
            )
        if isinstance(module, GPTModel | MultiLatentAttention) and hasattr(module, "rotary_pos_emb"):
            module.rotary_pos_emb = TreePositions(module.rotary_pos_emb)
