"""A micro-batch whose shared prefixes are computed once.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from polyturn.trainer.data.balance import prefix_keys
from polyturn.trainer.data.prefix_tree import Node, PrefixTree, build_tree
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.packed import PackedBatch, make_packed_batch, predicting_rows
from polyturn.trainer.megatron.tree_attention import describe_tree


def make_tree_batch(
    samples: Sequence[TrainSample], *, device: torch.device, multiple: int = 1
) -> PackedBatch:
    """Lay samples out as a tree, filled up to a multiple of `multiple` tokens with a sequence nobody reads.

    A trainable token has its row in every sample that it is of: what is predicted there is computed once for each,
    what leads up to it once for all. So whatever differs between the samples (the next token, its advantage, whether it
    is trained on at all) stays their own. Samples that share nothing are laid side by side as ever.
    """
    tree = build_tree(prefix_keys(samples))
    if tree.sharing.num_tokens == tree.sharing.num_separate_tokens:
        return make_packed_batch(samples, device=device, multiple=multiple)
    rows = [path[predicting_rows(s.sampled)] for s, path in zip(samples, tree.paths, strict=True)]
    targets = [sample.token_ids[sample.sampled] for sample in samples]
    num_rows = [len(found) for found in rows]
    filled = _fill(_with_tokens(tree, samples), multiple)
    nothing = np.zeros(0, dtype=np.int64)
    return PackedBatch(
        samples=tuple(samples),
        input_ids=torch.from_numpy(filled.token_ids)[None].to(device),
        position_ids=torch.from_numpy(filled.positions)[None].to(device),
        sequences=describe_tree(filled, device, tree.sharing),
        rows=torch.from_numpy(np.concatenate([nothing, *rows])).to(device),
        targets=torch.from_numpy(np.concatenate([nothing, *targets])).to(device),
        own_rows=torch.arange(sum(num_rows), device=device),
        sample_of_row=torch.from_numpy(np.repeat(np.arange(len(samples)), num_rows)).to(device),
        routed_experts=_lay_routing(filled, samples, device),
    )


def _with_tokens(tree: PrefixTree, samples: Sequence[TrainSample]) -> PrefixTree:
    """The tree of the samples' keys with their tokens in their place."""
    token_ids = np.zeros(tree.num_tokens, dtype=np.int64)
    for sample, path in zip(samples, tree.paths, strict=True):
        token_ids[path] = sample.token_ids
    return replace(tree, token_ids=token_ids)


def _lay_routing(
    tree: PrefixTree, samples: Sequence[TrainSample], device: torch.device
) -> torch.Tensor | None:
    """The experts of each token of the tree; samples with a token in common agree on them."""
    widths = {sample.routed_experts.shape[1] for sample in samples if sample.routed_experts is not None}
    if not widths:
        return None
    routing = np.full((tree.num_tokens, widths.pop()), -1, dtype=np.int16)
    for sample, path in zip(samples, tree.paths, strict=True):
        if sample.routed_experts is not None:
            routing[path] = sample.routed_experts
    return torch.from_numpy(routing).to(device)


def _fill(tree: PrefixTree, multiple: int) -> PrefixTree:
    num_filling = -tree.num_tokens % multiple
    if not num_filling:
        return tree
    end = tree.num_tokens + num_filling
    filling = Node(start=tree.num_tokens, end=end, descendants_end=end, depth=0)
    return replace(
        tree,
        token_ids=np.concatenate([tree.token_ids, np.zeros(num_filling, dtype=np.int64)]),
        positions=np.concatenate([tree.positions, np.arange(num_filling)]),
        nodes=(*tree.nodes, filling),
    )
