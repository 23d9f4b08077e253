"""Every layout of up to four ranks against one rank: scores, updates and exported weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.data.samples import TrainSample
from tests.support.megatron.layout_runs import Run, make_samples, run_layouts, train_on_faults
from tests.support.megatron.layout_table import DENSE, FAMILIES, MIXTURE, make_steady, name

pytestmark = pytest.mark.stack

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_steady(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="module")
def samples() -> list[TrainSample]:
    return make_samples()


@pytest.fixture(scope="module")
def single_of(rank_pool, tiny) -> Callable[..., Run]:
    """The run on one rank."""
    made: dict[tuple[str, str, tuple[int, ...]], Run] = {}

    def run(family: str, samples: list[Any], **settings: Any) -> Run:
        key = (family, repr(settings), tuple(len(sample) for sample in samples))
        if key not in made:
            arguments = (tiny(family), [ParallelConfig()], samples, settings)
            ((made[key],),) = rank_pool.run(1, run_layouts, *arguments)
        return made[key]

    return run


@pytest.fixture(scope="module")
def single(single_of, samples) -> Callable[..., Run]:
    return lambda family, **settings: single_of(family, samples, **settings)


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
    total = sum(expected.trained.values())
    assert {metrics["num_tokens"] for metrics in expected.metrics} == {total}, "each trained once"
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


@pytest.mark.catalogue("B19")
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


@pytest.mark.parametrize(
    ("family", "layout"), FAMILIES, ids=[f"{family}-{name(layout)}" for family, layout in FAMILIES]
)
def test_other_families_train_as_on_one_rank(rank_pool, tiny, samples, single, family, layout):
    """Shared experts and a corrected router, latent attention, norms around the blocks."""
    parallel = ParallelConfig(**layout)
    ranks = rank_pool.run(parallel.world_size, run_layouts, tiny(family), [parallel], samples, {})
    compare([rank for (rank,) in ranks], parallel, single(family))


def test_untied_embeddings_and_the_exported_directory(rank_pool, tiny, samples, single, tmp_path):
    """Two layouts one after the other in the same processes; the last is written by rank 0."""
    layouts = [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)]
    ranks = rank_pool.run(2, run_layouts, tiny("llama"), layouts, samples, {}, tmp_path / "out")
    for index, layout in enumerate(layouts):
        compare([runs[index] for runs in ranks], layout, single("llama"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    weights = ranks[0][1].weights
    assert weights is not None and written.keys() == weights.keys()
    for tensor_name, tensor in weights.items():
        assert torch.equal(tensor, written[tensor_name]), tensor_name


@pytest.mark.parametrize(
    "layout",
    [{"data": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"context": 2}, {"tensor": 2}],
    ids=name,
)
def test_packs_with_nothing_to_train_keep_the_ranks_in_step(rank_pool, tiny, single_of, layout):
    """Data-parallel ranks pack into different numbers, and one pack has no trainable token."""
    samples = make_samples([10, 50, 50, 50])
    samples[2] = replace(samples[2], sampled=np.zeros(50, dtype=np.bool_))
    parallel = ParallelConfig(**layout)
    ranks = rank_pool.run(2, run_layouts, tiny("qwen3"), [parallel], samples, {})
    compare([rank for (rank,) in ranks], parallel, single_of("qwen3", samples))


@pytest.mark.catalogue("B30")
def test_every_rank_names_the_sample_that_is_not_finite(rank_pool, tiny, samples):
    broken = replace(
        samples[3],
        proximal_logprobs=np.zeros(len(samples[3]), dtype=np.float32),
        advantages=np.full(len(samples[3]), np.nan, dtype=np.float32),
    )
    whole = [replace(s, proximal_logprobs=np.full(len(s), -5, dtype=np.float32)) for s in samples]
    faulty = [broken if sample is samples[3] else fine for sample, fine in zip(samples, whole, strict=True)]
    axes = [
        {"tensor": 2},
        {"data": 2},
        {"pipeline": 2},
        {"context": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
    ]
    layouts = [ParallelConfig(**layout) for layout in axes]
    for texts in rank_pool.run(2, train_on_faults, tiny("qwen3"), layouts, faulty):
        for text in texts:
            assert text.count(f"sample {broken.sample_id}: the advantage of token") == 1, text


OVERLAPPED = [
    ("qwen3", {"data": 2, "pipeline": 2, "virtual_pipeline": 2}),
    ("qwen3", {"context": 2, "data": 2}),
    ("qwen3_moe", {"expert": 2, "data": 2}),
]


@pytest.mark.parametrize(
    ("family", "layout"), OVERLAPPED, ids=[f"{family}-{name(layout)}" for family, layout in OVERLAPPED]
)
def test_gradients_summed_while_the_backward_pass_runs(rank_pool, tiny, samples, single, family, layout):
    parallel = ParallelConfig(**layout)
    settings = {"megatron": {"ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}}}
    ranks = rank_pool.run(parallel.world_size, run_layouts, tiny(family), [parallel], samples, settings)
    compare([rank for (rank,) in ranks], parallel, single(family))


BF16 = [
    ("qwen3", {"tensor": 2, "pipeline": 2}),
    ("qwen3", {"context": 2, "data": 2}),
    ("qwen3_moe", {"tensor": 2, "expert": 2, "pipeline": 2}),
]


@pytest.mark.parametrize(
    ("family", "layout"), BF16, ids=[f"{family}-{name(layout)}" for family, layout in BF16]
)
def test_bfloat16_trains_nearly_alike(rank_pool, tiny, samples, single, family, layout):
    """Sums in another order round otherwise: 2^-8 relative, a few times over."""
    parallel = ParallelConfig(**layout)
    settings = {"dtype": "bfloat16"}
    expected = single(family, **settings)
    ranks = [run for (run,) in rank_pool.run(4, run_layouts, tiny(family), [parallel], samples, settings)]
    assert len({rank.digest for rank in ranks}) == 1
    assert ranks[0].weights is not None and expected.weights is not None
    for rank in ranks:
        assert rank.metrics == ranks[0].metrics
        for sample_id, column in rank.before.items():
            np.testing.assert_allclose(column, expected.before[sample_id], atol=0.15)
    for ours, theirs in zip(ranks[0].metrics, expected.metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.03)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.15)
    for tensor_name, tensor in ranks[0].weights.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(
            tensor, expected.weights[tensor_name], atol=0.02, rtol=0.02, msg=tensor_name
        )
