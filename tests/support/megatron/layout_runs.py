"""What a rank does in the tests of layouts: score, train for some updates, score again, export."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyturn.configs.schema.objective import KLInLoss, SequenceMean
from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from tests.support.megatron.ranks_pool import RankContext
from tests.support.samples import random_samples

# A large epsilon keeps AdamW smooth where a gradient is nearly 0, so that rounding does not show as a whole step.
SMOOTH = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, weight_decay=0.1, clip_grad=0.5)
OBJECTIVE = Objective(
    kl=KLInLoss(kind="in_loss", coefficient=0.1),
    entropy_coefficient=0.05,
    reduction=SequenceMean(kind="sequence_mean"),
    temperature=0.8,
)
NUM_UPDATES = 3
LENGTHS = [5, 40, 17, 3, 33, 17, 61]
VOCAB_SIZE = 301


def make_samples(lengths: Sequence[int] = LENGTHS) -> list[TrainSample]:
    """Random samples with about half of their tokens trainable; the second and the last are one sequence."""
    samples = random_samples(lengths)
    for i in (1, len(samples) - 1):
        samples[i] = replace(samples[i], sequence_id="shared")
    return samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one rank saw."""

    before: dict[str, np.ndarray]
    """The logprobs of its samples before the first update."""
    metrics: list[dict[str, float]]
    after: dict[str, np.ndarray]
    """And after the last."""
    trained: dict[str, int]
    """Trainable tokens by sample, as this rank reports them."""
    digest: str
    """Of the exported tensors, which are the same on all ranks."""
    weights: dict[str, torch.Tensor] | None
    """Those tensors, from rank 0."""


def run_layouts(
    context: RankContext,
    path: Path,
    layouts: Sequence[ParallelConfig],
    samples: list[TrainSample],
    settings: dict[str, Any],
    export: Path | None = None,
) -> list[Run]:
    """Each layout in turn, in one process after the other's groups are gone. The last one's model is exported."""
    return [
        _run(context.again(number), path, layout, samples, settings, export)
        for number, layout in enumerate(layouts)
    ]


def train_on_faults(
    context: RankContext, path: Path, layouts: Sequence[ParallelConfig], samples: list[TrainSample]
) -> list[str]:
    """What the rank raises in an update of each layout."""
    return [_failure(context.again(number), path, layout, samples) for number, layout in enumerate(layouts)]


def _failure(context: RankContext, path: Path, layout: ParallelConfig, samples: list[TrainSample]) -> str:
    from tests.support.megatron.policies import make_policy

    policy = make_policy(path, parallel=layout, max_tokens_per_gpu=64 // layout.context, place=context.place)
    try:
        own = split_over_ranks(samples, layout.data)[policy.data_parallel_rank]
        policy.train(own, objective=Objective(), global_counts=count_samples(samples))
    except FloatingPointError as error:
        return str(error)
    finally:
        policy.close()
    return ""


def _run(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    settings: dict[str, Any],
    export: Path | None,
) -> Run:
    from tests.support.megatron.policies import make_policy

    counts = count_samples(samples)
    settings = {"optimizer": SMOOTH, "max_tokens_per_gpu": 64 // layout.context, **settings}
    policy = make_policy(path, parallel=layout, keep_reference=True, **settings, place=context.place)
    try:
        own = split_over_ranks(samples, layout.data)[policy.data_parallel_rank]
        before = _score(policy, own)
        references = policy.reference_logprobs(own, temperature=OBJECTIVE.temperature)
        scored = [
            replace(sample, proximal_logprobs=before[sample.sample_id], reference_logprobs=reference)
            for sample, reference in zip(own, references, strict=True)
        ]
        metrics = [
            policy.train(scored, objective=OBJECTIVE, global_counts=counts) for _ in range(NUM_UPDATES)
        ]
        after = _score(policy, own)
        weights = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
        if export is not None:
            policy.save_hf(export)
    finally:
        policy.close()
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return Run(
        before=before,
        metrics=metrics,
        after=after,
        trained={sample.sample_id: sample.num_trainable for sample in own},
        digest=digest.hexdigest(),
        weights=weights if context.rank == 0 else None,
    )


def _score(policy: Any, samples: list[TrainSample]) -> dict[str, np.ndarray]:
    columns = policy.logprobs(samples, temperature=OBJECTIVE.temperature)
    return {sample.sample_id: column for sample, column in zip(samples, columns, strict=True)}
