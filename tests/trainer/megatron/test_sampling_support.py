"""Tokens that were drawn from a part of the vocabulary are scored and trained over that part, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyturn.agents.sampling_support import SamplingSupport
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.packing import make_packed_batch
from tests.support.megatron.layout_runs import OBJECTIVE, Run, run_layouts
from tests.support.megatron.tiny_families import make_tiny
from tests.support.samples import make_sample, random_samples, with_supports

LAYOUTS = [{"tensor": 2}, {"context": 2}, {"pipeline": 2}, {"data": 2}]


@pytest.fixture(scope="module")
def samples() -> list[TrainSample]:
    """Three with a prefix in common, of which each was drawn from tokens of its own, and two others."""
    made = random_samples([50, 61, 44, 17, 5])
    tokens = [sample.token_ids.copy() for sample in made]
    for other in (1, 2):
        tokens[other][:30] = tokens[0][:30]
    return with_supports([replace(sample, token_ids=ids) for sample, ids in zip(made, tokens, strict=True)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3", tmp_path_factory.mktemp("qwen3"), initializer_range=0.2)


@pytest.fixture(scope="module")
def run(rank_pool: Any, tiny: Path, samples: list[TrainSample]) -> Callable[..., Run]:
    """A run on one rank."""
    made: dict[str, Run] = {}

    def of(shared_prefix: str) -> Run:
        if shared_prefix not in made:
            settings = {"shared_prefix": shared_prefix, "max_tokens_per_gpu": 200}
            ((made[shared_prefix],),) = rank_pool.run(
                1, run_layouts, tiny, [ParallelConfig()], samples, settings
            )
        return made[shared_prefix]

    return of


def restricted_logprobs(path: Path, sample: TrainSample) -> np.ndarray:
    """Plain transformers: a column [T], over what each token was drawn from."""
    from transformers import AutoModelForCausalLM

    assert sample.support is not None
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.token_ids).long()[None]).logits[0]
    logits = logits / OBJECTIVE.temperature
    column = np.zeros(len(sample), dtype=np.float32)
    rows = np.split(sample.support.token_ids, sample.support.offsets[1:-1])
    for place in np.flatnonzero(sample.sampled):
        own = logits[place - 1] if not len(rows[place]) else logits[place - 1][rows[place]]
        column[place] = logits[place - 1][sample.token_ids[place]] - own.logsumexp(0)
    return column


def assert_alike(ranks: list[Run], expected: Run) -> None:
    for when in ("before", "after"):
        found = {name: column for rank in ranks for name, column in getattr(rank, when).items()}
        assert found.keys() == getattr(expected, when).keys()
        for name, column in found.items():
            np.testing.assert_allclose(column, getattr(expected, when)[name], atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(ranks[0].metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert theirs["grad_norm"] > 0.01
    assert ranks[0].weights is not None and expected.weights is not None
    for name, tensor in ranks[0].weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.catalogue("B24")
@pytest.mark.stack
def test_logprobs_are_over_what_a_token_was_drawn_from(run, tiny, samples):
    found = run("off")
    for sample in samples:
        expected = restricted_logprobs(tiny, sample)
        np.testing.assert_allclose(found.before[sample.sample_id], expected, atol=5e-6, rtol=0)
    # The reference is the policy itself before the first update: over the same tokens there is nothing between them.
    assert found.metrics[0]["reference_kl"] == pytest.approx(0, abs=1e-7)
    assert found.metrics[0]["policy_kl"] == pytest.approx(0, abs=1e-7)
    assert 0 < found.metrics[0]["entropy"] < np.log(20), "of 20 tokens at most, but for a few rows"


@pytest.mark.catalogue("B24")
@pytest.mark.stack
def test_layouts_train_over_it_as_one_rank_does(rank_pool, run, tiny, samples):
    """Columns of the vocabulary, rows of a sequence and layers are other ranks'."""
    parallel = [ParallelConfig(**layout) for layout in LAYOUTS]
    ranks = rank_pool.run(2, run_layouts, tiny, parallel, samples, {})
    for number in range(len(LAYOUTS)):
        assert_alike([rank[number] for rank in ranks], run("off"))


@pytest.mark.catalogue("B24")
@pytest.mark.stack
def test_a_prefix_in_common_keeps_what_each_sample_was_drawn_from(run):
    assert_alike([run("tree")], run("off"))


@pytest.mark.catalogue("B24")
def test_a_pack_has_the_pairs_of_its_trainable_tokens_in_their_order():
    """A token that is not trained on any more leaves its pairs behind; a sample without a support has none."""
    support = SamplingSupport(sizes=np.array([0, 2, 1, 3, 2]), token_ids=np.array([5, 9, 3, 6, 8, 7, 4, 6]))
    drawn = make_sample([1, 5, 3, 7, 4], support=support, sampled=np.array([0, 1, 1, 1, 0], dtype=bool))
    pack = make_packed_batch([make_sample([1, 2]), drawn, make_sample([3, 4])], device=torch.device("cpu"))
    assert pack.targets.tolist() == [2, 5, 3, 7, 4]
    assert pack.support is not None
    assert pack.support.open_rows.tolist() == [0, 1, 3, 4], "the third was drawn from itself alone"
    assert pack.support.row_of.tolist() == [1, 1, 2, 2, 2]
    assert pack.support.token_ids.tolist() == [5, 9, 6, 8, 7]
    assert pack.support.offsets.tolist() == [0, 0, 2, 5, 5]
    assert pack.support.is_restricted.tolist() == [False, True, True, False]
    assert make_packed_batch([make_sample([1, 2])], device=torch.device("cpu")).support is None
