"""Every model family in Megatron-core against transformers, on one rank and sharded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import HAS_EXPERTS, TINY, make_tiny, run_rank

from polyturn.configs.parallel import ParallelConfig

pytestmark = pytest.mark.stack

TOLERANCE = 2e-6
"""Relative to the largest logit."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 2},
        {"pipeline": 2},
        {"expert": 2, "data": 2},
        {"tensor": 2, "expert": 2, "pipeline": 2},
        {"tensor": 2, "expert_tensor": 2, "data": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2},
    ],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()) or "one",
)
def test_logits_are_those_of_transformers(rank_pool, tiny, layout: dict[str, Any]):
    names = HAS_EXPERTS if "expert" in layout or "expert_tensor" in layout else TINY
    parallel = ParallelConfig(**layout)
    directories = {name: tiny(name) for name in names}
    ranks = rank_pool.run(parallel.world_size, run_rank, directories, parallel)
    for name, directory in directories.items():
        expected = torch.load(directory / "logits.pt")
        all_logits = [rank[name]["logits"] for rank in ranks if rank[name]["logits"] is not None]
        assert all_logits
        for logits in all_logits:
            error = (logits - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{name}: {error}"
        assert all(rank[name]["names"] == ranks[0][name]["names"] for rank in ranks), "one order on all ranks"
