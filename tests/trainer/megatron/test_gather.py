"""What gathering the weights for the engines takes: no rank ever holds more than a few tensors of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.layout_table import name
from tests.support.megatron.ranks_pool import RankContext
from tests.support.megatron.tiny_families import make_tiny

pytestmark = pytest.mark.stack


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """What one rank saw."""

    held: int
    """The most bytes at once, beside the rank's own part of the model."""
    largest: int
    """Bytes of the largest Hugging Face tensor."""
    total: int
    """Of all."""
    digests: dict[str, str]
    """Of each tensor. Layouts have them in different orders."""


def gather(context: RankContext, path: Path, layout: ParallelConfig) -> Gathered:
    """Go through all tensors twice: to see how much is held, and what they are."""
    from tests.support.held_bytes import HeldBytes
    from tests.support.megatron.policies import make_policy

    policy = make_policy(path, parallel=layout, place=context.place)
    try:
        params = [param for chunk in policy._engine.chunks for param in chunk.parameters()]
        sizes = []
        with torch.no_grad(), HeldBytes(without=params) as held:
            for _, tensor in policy.named_hf_tensors():
                sizes.append(tensor.numel() * tensor.element_size())
        digests = {
            key: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
            for key, tensor in policy.named_hf_tensors()
        }
    finally:
        policy.close()
    return Gathered(held=held.highest, largest=max(sizes), total=sum(sizes), digests=digests)


@pytest.mark.parametrize(
    ("family", "layout", "at_once"),
    [
        ("qwen3", {"tensor": 2}, 3),
        ("qwen3_moe", {"tensor": 2, "pipeline": 2, "expert": 2}, 5),
        ("deepseek_v3", {"tensor": 2, "pipeline": 2, "expert": 2}, 5),
    ],
    ids=lambda value: name(value) if isinstance(value, dict) else str(value),
)
def test_no_rank_holds_more_than_a_few_tensors_and_all_see_the_same(
    rank_pool, tmp_path: Path, family: str, layout: dict[str, int], at_once: int
) -> None:
    path = make_tiny(family, tmp_path, num_hidden_layers=8)
    parallel = ParallelConfig(**layout)
    ((alone,),) = (rank_pool.run(1, gather, path, ParallelConfig()),)
    ranks = rank_pool.run(parallel.world_size, gather, path, parallel)
    for rank in ranks:
        assert rank.held <= at_once * rank.largest < rank.total / 2, (rank.held, rank.largest, rank.total)
        assert (rank.digests, rank.total) == (alone.digests, alone.total)
