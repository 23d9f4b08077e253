"""Attention over a tree of shared prefixes against each sequence by itself: values, gradients, seconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_check.parts import Device, Failure
from benchmarks.gpu_check.timing import seconds_of
from polyturn.trainer.data.prefix_tree import PrefixTree, build_tree
from polyturn.trainer.megatron.tree_attention import attend_tree

SIZES = {"cuda": (2048, 8, 1024, 32, 8, 128), "cpu": (40, 3, 24, 4, 2, 16)}
"""Tokens of the shared prompt, branches, tokens of each, heads, groups of keys, width."""
TOLERANCE = {"cuda": 2e-2, "cpu": 1e-5}
"""Relative to the norm; bfloat16 on a GPU, float32 on a CPU."""


def run(device: Device) -> dict[str, Any]:
    prompt, branches, length, heads, groups, width = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 1000, prompt)
    tree = build_tree([np.concatenate([shared, rng.integers(3, 1000, length)]) for _ in range(branches)])
    torch.manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        return torch.randn(tree.num_tokens, count, width, device=device, dtype=dtype).requires_grad_()

    inputs = (drawn(heads), drawn(groups), drawn(groups))
    weights = torch.randn(tree.num_tokens, heads * width, device=device)
    paths = [torch.from_numpy(path).to(device) for path in tree.paths]

    def as_tree() -> torch.Tensor:
        found = attend_tree(*inputs, nodes=tree.nodes, scale=width**-0.5)
        (found.float() * weights).sum().backward()
        return found.detach()

    def one_by_one(wide: bool) -> torch.Tensor:
        whole = torch.zeros(tree.num_tokens, heads * width, device=device)
        given = [x.float() if wide else x for x in inputs]
        for path, new in zip(paths, _first_seen(tree, device), strict=True):
            query, key, value = (x[path].transpose(0, 1)[None] for x in given)
            found = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            rows = found[0].transpose(0, 1).flatten(1)[new].float()
            (rows * weights[path[new]]).sum().backward(retain_graph=True)
            whole[path[new]] = rows.detach()
        return whole

    ours, our_gradients = as_tree(), _taken(inputs)
    exact, exact_gradients = one_by_one(True), _taken(inputs)
    figures: dict[str, Any] = {
        "value_difference": _distance(ours, exact),
        "gradient_difference": max(map(_distance, our_gradients, exact_gradients)),
        "tokens_of_separate": tree.num_tokens / sum(map(len, paths)),
        "seconds_of_separate": seconds_of(as_tree, device, repeats=3)
        / seconds_of(lambda: one_by_one(False), device, repeats=3),
    }
    if max(figures["value_difference"], figures["gradient_difference"]) > TOLERANCE[device]:
        raise Failure("attention over the tree computes something else", **figures)
    return figures


def _first_seen(tree: PrefixTree, device: Device) -> list[torch.Tensor]:
    """For each path, its places whose tokens are in no path before it: each token of the tree counts once."""
    seen = np.zeros(tree.num_tokens, dtype=bool)
    places = []
    for path in tree.paths:
        places.append(torch.from_numpy(np.flatnonzero(~seen[path])).to(device))
        seen[path] = True
    return places


def _taken(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    gradients = [x.grad.float() for x in inputs if x.grad is not None]
    for x in inputs:
        x.grad = None
    return gradients


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())
