"""What a rank does in the tests of objectives: score, move the anchors a little, train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from tests.support.megatron.layout_runs import SMOOTH
from tests.support.megatron.ranks_pool import RankContext

NUM_UPDATES = 2


def train_on_objectives(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    objectives: Sequence[Objective],
) -> list[list[dict[str, float]]]:
    """The metrics of each objective's updates, one model after the other."""
    return [
        _train(context.again(number), path, layout, samples, objective)
        for number, objective in enumerate(objectives)
    ]


def _train(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    objective: Objective,
) -> list[dict[str, float]]:
    from tests.support.megatron.policies import make_policy

    policy = make_policy(
        path, parallel=layout, optimizer=SMOOTH, max_tokens_per_gpu=64 // layout.context, place=context.place
    )
    if objective.by_environment:
        names = [*objective.by_environment, ""]
        groups = sorted({sample.group_id for sample in samples})
        samples = [replace(s, environment=names[groups.index(s.group_id) % len(names)]) for s in samples]
    try:
        own = split_over_ranks(samples, layout.data)[policy.data_parallel_rank]
        scored = [
            replace(
                sample,
                proximal_logprobs=found + 0.02,
                behavior_logprobs=found - 0.03,
                reference_logprobs=found - 0.1,
            )
            for sample, found in zip(own, policy.logprobs(own), strict=True)
        ]
        counts = count_samples(samples)
        return [policy.train(scored, objective=objective, global_counts=counts) for _ in range(NUM_UPDATES)]
    finally:
        policy.close()
