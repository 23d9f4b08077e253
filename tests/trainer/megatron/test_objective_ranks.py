"""Objectives that look at whole sequences, over ranks: as on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyturn.configs.schema.objective import GSPOLoss, KLInLoss, PromptMean, SequenceMean, VESPOLoss
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.samples import TrainSample
from tests.support.megatron.layout_runs import make_samples
from tests.support.megatron.layout_table import make_steady
from tests.support.megatron.objective_runs import train_on_objectives

pytestmark = pytest.mark.stack

OBJECTIVES = [
    Objective(
        loss=GSPOLoss(kind="gspo", clip_low=0.5, clip_high=1.0),
        kl=KLInLoss(kind="in_loss", estimator="k3", ratio="differentiated", coefficient=0.1),
        entropy_coefficient=0.05,
        reduction=SequenceMean(kind="sequence_mean"),
    ),
    Objective(loss=VESPOLoss(kind="vespo"), reduction=PromptMean(kind="prompt_mean")),
    # Environments with algorithms of their own: some ranks and micro-batches have tokens of one only.
    Objective(
        entropy_coefficient=0.05,
        by_environment={
            "a": Objective(
                loss=GSPOLoss(kind="gspo", clip_low=0.5, clip_high=1.0),
                kl=KLInLoss(kind="in_loss", coefficient=0.1),
                reduction=SequenceMean(kind="sequence_mean"),
                weight=0.7,
            )
        },
    ),
]
LAYOUTS = {
    "data": ParallelConfig(data=2),
    "context": ParallelConfig(context=2),
    "data-context": ParallelConfig(data=2, context=2),
    "tensor-pipeline": ParallelConfig(tensor=2, pipeline=2),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_steady("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def samples() -> list[TrainSample]:
    """Two of them are segments of one sequence; a third of the tokens is rejected."""
    rng = np.random.default_rng(1)
    return [
        replace(sample, correction_weights=rng.choice([0.0, 0.5, 1.5], len(sample)).astype(np.float32))
        for sample in make_samples()
    ]


@pytest.fixture(scope="module")
def expected(rank_pool, path, samples) -> list[list[dict[str, float]]]:
    (found,) = rank_pool.run(1, train_on_objectives, path, ParallelConfig(), samples, OBJECTIVES)
    return found


@pytest.mark.catalogue("B18", "B19")
@pytest.mark.parametrize("name", LAYOUTS)
def test_sequences_are_whole_over_ranks(rank_pool, path, samples, expected, name):
    layout = LAYOUTS[name]
    ranks = rank_pool.run(layout.world_size, train_on_objectives, path, layout, samples, OBJECTIVES)
    for metrics in ranks:
        for ours, theirs in zip(metrics, expected, strict=True):
            for update, single in zip(ours, theirs, strict=True):
                assert update == pytest.approx(single, rel=1e-5, abs=1e-5)
                assert single["grad_norm"] > 0.01
