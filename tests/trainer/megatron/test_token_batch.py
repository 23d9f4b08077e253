"""What a pack hands to the objective: each sample's columns, and the totals of its sequence and its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from polyturn.configs.schema.objective import ClipLoss, GSPOLoss, KLInLoss, PromptMean, SequenceMean
from polyturn.configs.schema.trainer import OptimizerConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.megatron.packing import (
    make_packed_batch,
    token_batch,
)
from tests.support.megatron.policies import make_policy

LENGTHS = [5, 40, 17, 3, 33, 17, 60, 9]
SEQUENCES = ["a", "a", "b", "c", "c", "c", "d", "e"]
PROMPTS = ["p", "p", "p", "q", "q", "q", "q", "r"]


@pytest.fixture(scope="module")
def samples(make_samples: Callable[..., list[TrainSample]]) -> list[TrainSample]:
    """Segments of five episodes of three prompts, with every column; the last has nothing to train on."""
    rng = np.random.default_rng(3)

    def complete(index: int, sample: TrainSample) -> TrainSample:
        count = len(sample)
        proximal = rng.normal(-5, 0.3, count).astype(np.float32)
        return replace(
            sample,
            sequence_id=SEQUENCES[index],
            group_id=PROMPTS[index],
            sampled=sample.sampled & (index != len(LENGTHS) - 1),
            turns=np.arange(count, dtype=np.int32),
            policy_versions=np.full(count, index, dtype=np.int32),
            proximal_logprobs=proximal,
            reference_logprobs=proximal + rng.normal(0, 0.2, count).astype(np.float32),
            correction_weights=rng.choice([0.0, 0.5, 1.5], count).astype(np.float32),
        )

    return [complete(index, sample) for index, sample in enumerate(make_samples(LENGTHS))]


def hand_over(samples: Sequence[TrainSample], objective: Objective, everything: Sequence[TrainSample]):
    pack = make_packed_batch(samples, device=torch.device("cpu"))
    logprobs = torch.arange(len(pack.rows), dtype=torch.float32)
    return token_batch(pack, objective, count_samples(everything), logprobs, logprobs / 2)


OBJECTIVE = Objective(kl=KLInLoss(kind="in_loss"))


def test_columns_are_those_of_the_samples_at_their_trainable_tokens(samples):
    part = samples[2:6]
    batch = hand_over(part, OBJECTIVE, samples)

    def flat(name: str) -> list[float]:
        return np.concatenate([getattr(sample, name)[sample.sampled] for sample in part]).tolist()

    for name in (
        "advantages",
        "behavior_logprobs",
        "proximal_logprobs",
        "reference_logprobs",
        "correction_weights",
    ):
        assert getattr(batch, name).tolist() == flat(name), name
    assert batch.turns.tolist() == flat("turns") and batch.policy_versions.tolist() == flat("policy_versions")
    assert batch.mask.all() and batch.num_sequences == 4
    assert torch.bincount(batch.sequence_index).tolist() == [sample.num_trainable for sample in part]


def test_totals_are_those_of_the_whole_update(samples):
    batch = hand_over(samples[3:5], OBJECTIVE, samples)
    numbers = [sample.num_trainable for sample in samples]
    assert set(batch.sequence_lengths.tolist()) == {sum(numbers[3:6])}
    assert set(batch.prompt_lengths.tolist()) == {sum(numbers[3:7])}


def test_a_pack_of_nothing_trainable_is_empty(samples):
    for part in (samples[-1:], []):
        batch = hand_over(part, OBJECTIVE, samples)
        assert len(batch.logprobs) == len(batch.sequence_lengths) == len(batch.turns) == 0
        assert batch.num_sequences == len(part)


@pytest.mark.parametrize(
    "name", ["advantages", "proximal_logprobs", "reference_logprobs", "correction_weights"]
)
def test_a_column_that_is_missing_is_named(samples, name):
    with pytest.raises(ValueError, match=f"sample sample-1 has no {name}"):
        hand_over([samples[0], replace(samples[1], **{name: None})], OBJECTIVE, samples)


@pytest.mark.catalogue("B14", "B18")
@pytest.mark.parametrize(
    "objective",
    [
        Objective(
            loss=GSPOLoss(kind="gspo", clip_low=0.5, clip_high=5.0),
            kl=KLInLoss(kind="in_loss", estimator="k3", ratio="differentiated", coefficient=0.1),
            reduction=SequenceMean(kind="sequence_mean"),
        ),
        Objective(
            loss=ClipLoss(dual_clip=3.0), reduction=PromptMean(kind="prompt_mean"), entropy_coefficient=0.1
        ),
    ],
    ids=["gspo", "clip"],
)
def test_an_update_is_the_same_however_it_is_packed(
    make_model: Callable[..., Path], samples: list[TrainSample], objective: Objective
):
    """With several segments an episode, losses and reductions by sequence, and corrections."""
    results = []
    for max_tokens in (8192, 70, 1):
        policy = make_policy(
            make_model("qwen3", tied=True),
            optimizer=OptimizerConfig(learning_rate=0.01, epsilon=1e-3, clip_grad=0.5),
            max_tokens_per_gpu=max_tokens,
        )
        try:
            logprobs = policy.logprobs(samples)
            near = [
                replace(s, proximal_logprobs=found + 0.05, reference_logprobs=found - 0.1)
                for s, found in zip(samples, logprobs, strict=True)
            ]
            metrics = policy.train(near, objective=objective, global_counts=count_samples(near))
            results.append((metrics["loss"], metrics["grad_norm"], metrics["clip_fraction"]))
        finally:
            policy.close()
    assert results[0][1] > 1e-3
    for found in results[1:]:
        assert found == pytest.approx(results[0], rel=1e-4, abs=1e-6)
