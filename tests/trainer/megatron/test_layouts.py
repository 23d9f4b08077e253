"""Every layout of up to four ranks against one rank: scores, updates and exported weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import Run, run_layouts
from tiny_families import HAS_EXPERTS, make_tiny

from polyturn.configs.parallel import ParallelConfig

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 3, 33, 17, 61]
TOLERANCE = 1e-5

DENSE = [
    {"tensor": 2},
    {"pipeline": 2},
    {"context": 2},
    {"data": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "context": 2},
    {"pipeline": 2, "context": 2},
    {"tensor": 2, "data": 2},
    {"context": 2, "data": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    {"pipeline": 4},
    {"context": 4},
]
MIXTURE = [
    {"expert": 2, "data": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"tensor": 2, "expert": 2},
    {"context": 2, "expert": 2},
    {"expert": 2, "data": 2, "pipeline": 2},
    {"tensor": 2, "expert": 4, "data": 2},
    {"tensor": 2, "expert": 2, "expert_tensor": 2, "data": 2},
    {"tensor": 2, "data": 2},
]


def name(layout: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in layout.items())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            # Small weights keep a mixture's updates from magnifying rounding, as they do where routing is steep.
            initializer_range = 0.05 if family in HAS_EXPERTS else 0.2
            made[family] = make_tiny(
                family, tmp_path_factory.mktemp(family), initializer_range=initializer_range
            )
        return made[family]

    return make


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., Any]) -> list[Any]:
    """Two of them are one sequence, in different micro-batches or on different ranks."""
    made = make_samples(LENGTHS)
    return [replace(sample, sequence_id="one") if i in (1, 6) else sample for i, sample in enumerate(made)]


@pytest.fixture(scope="module")
def single(rank_pool, tiny, samples) -> Callable[..., Run]:
    """The run on one rank."""
    made: dict[tuple[str, str], Run] = {}

    def run(family: str, **settings: Any) -> Run:
        key = (family, repr(settings))
        if key not in made:
            arguments = (tiny(family), [ParallelConfig()], samples, settings)
            ((made[key],),) = rank_pool.run(1, run_layouts, *arguments)
        return made[key]

    return run


def compare(ranks: list[Run], layout: ParallelConfig, expected: Run, *, tolerance: float = TOLERANCE) -> None:
    assert len({rank.digest for rank in ranks}) == 1, "every rank exports the same"
    for number, rank in enumerate(ranks):
        place = layout.place(number)
        assert rank.metrics == ranks[0].metrics, "metrics are global"
        twin = ranks[layout.first_ranks()[place.data]]
        for columns, twins, theirs in (
            (rank.before, twin.before, expected.before),
            (rank.after, twin.after, expected.after),
        ):
            assert columns.keys() == twins.keys()
            for sample_id, column in columns.items():
                np.testing.assert_array_equal(column, twins[sample_id])
                np.testing.assert_allclose(column, theirs[sample_id], atol=tolerance, rtol=tolerance)
    seen = [sample_id for first in layout.first_ranks() for sample_id in ranks[first].before]
    assert sorted(seen) == sorted(expected.before), "each sample is one data-parallel rank's"
    for ours, theirs in zip(ranks[0].metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
        assert theirs["grad_norm"] > 0.01
    assert ranks[0].weights is not None and expected.weights is not None
    assert ranks[0].weights.keys() == expected.weights.keys()
    for tensor_name, tensor in ranks[0].weights.items():
        torch.testing.assert_close(
            tensor, expected.weights[tensor_name], atol=tolerance, rtol=tolerance, msg=tensor_name
        )


@pytest.mark.parametrize("layout", DENSE, ids=name)
def test_a_dense_model_trains_as_on_one_rank(rank_pool, tiny, samples, single, layout):
    parallel = ParallelConfig(**layout)
    ranks = rank_pool.run(parallel.world_size, run_layouts, tiny("qwen3"), [parallel], samples, {})
    compare([rank for (rank,) in ranks], parallel, single("qwen3"))


@pytest.mark.parametrize("layout", MIXTURE, ids=name)
def test_a_mixture_of_experts_trains_as_on_one_rank(rank_pool, tiny, samples, single, layout):
    parallel = ParallelConfig(**layout)
    ranks = rank_pool.run(parallel.world_size, run_layouts, tiny("qwen3_moe"), [parallel], samples, {})
    compare([rank for (rank,) in ranks], parallel, single("qwen3_moe"))


FAMILIES = [
    ("glm4_moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
    ("glm4_moe", {"context": 2, "expert": 2, "pipeline": 2}),
    ("deepseek_v3", {"tensor": 2, "context": 2, "expert": 4}),
    ("deepseek_v3", {"tensor": 2, "pipeline": 2, "expert": 2}),
    ("glm4", {"tensor": 2, "context": 2}),
]


@pytest.mark.parametrize(
    ("family", "layout"), FAMILIES, ids=[f"{family}-{name(layout)}" for family, layout in FAMILIES]
)
def test_other_families_train_as_on_one_rank(rank_pool, tiny, samples, single, family, layout):
    """Shared experts and a corrected router, latent attention, norms around the blocks."""
    parallel = ParallelConfig(**layout)
    ranks = rank_pool.run(parallel.world_size, run_layouts, tiny(family), [parallel], samples, {})
    compare([rank for (rank,) in ranks], parallel, single(family))
