"""The optimizer updates of one step, on one rank."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polyturn.configs.schema import RunConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.batch import TrainSample, split_over_ranks

if TYPE_CHECKING:
    from polyturn.trainer.megatron.policy import MegatronPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateShare:
    """One data-parallel rank's samples of one optimizer update, with the denominators of the whole update."""

    samples: tuple[TrainSample, ...]
    counts: GlobalCounts


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What one data-parallel rank did in a step."""

    metrics: tuple[Mapping[str, float], ...]
    """Per update, reduced over all ranks."""
    trained_tokens: Mapping[str, int]
    """Trainable tokens of each sample that went into an update of this rank."""
    max_logprob_difference: float
    """Largest |trainer - engine| logprob over this rank's sampled tokens, before the first update."""
    max_logprob_sample: str
    seconds: float


def split_updates(
    samples: Sequence[TrainSample], *, num_updates: int, num_ranks: int
) -> list[tuple[UpdateShare, ...]]:
    """Cut a step into updates, and each update over the data-parallel ranks, balanced by tokens.

    Denominators are taken here, from the whole update, before anything is split. Returns one tuple of `num_updates`
    shares per rank. Raises `ValueError` when there are too few samples for that.
    """
    bounds = [len(samples) * index // num_updates for index in range(num_updates + 1)]
    shares: list[list[UpdateShare]] = [[] for _ in range(num_ranks)]
    for low, high in itertools.pairwise(bounds):
        update = samples[low:high]
        counts = GlobalCounts.of(sample.num_trainable for sample in update)
        for rank, part in enumerate(split_over_ranks(update, num_ranks)):
            shares[rank].append(UpdateShare(samples=tuple(part), counts=counts))
    return [tuple(share) for share in shares]


def run_updates(policy: MegatronPolicy, shares: Sequence[UpdateShare], *, config: RunConfig) -> UpdateReport:
    """Score the step's samples with the weights as they are, then update once per share."""
    started = time.perf_counter()
    objective = Objective.from_config(
        config.trainer.algorithm, temperature=config.rollout.sampling.temperature
    )
    scored = score(policy, [sample for share in shares for sample in share.samples], objective)
    difference, where = largest_logprob_difference(list(scored.values()))
    metrics = []
    trained: dict[str, int] = {}
    for share in shares:
        samples = [scored[sample.sample_id] for sample in share.samples]
        metrics.append(policy.train(samples, objective=objective, global_counts=share.counts))
        for sample in samples:
            trained[sample.sample_id] = trained.get(sample.sample_id, 0) + sample.num_trainable
    return UpdateReport(
        metrics=tuple(metrics),
        trained_tokens=trained,
        max_logprob_difference=difference,
        max_logprob_sample=where,
        seconds=time.perf_counter() - started,
    )


def score(
    policy: MegatronPolicy, samples: Sequence[TrainSample], objective: Objective
) -> dict[str, TrainSample]:
    """The samples with their proximal logprobs, and the reference's where the objective asks for them, by id."""
    proximal = policy.logprobs(samples, temperature=objective.temperature)
    scored = [
        replace(sample, proximal_logprobs=column) for sample, column in zip(samples, proximal, strict=True)
    ]
    if objective.kl_coefficient > 0:
        reference = policy.reference_logprobs(samples, temperature=objective.temperature)
        scored = [
            replace(sample, reference_logprobs=column)
            for sample, column in zip(scored, reference, strict=True)
        ]
    return {sample.sample_id: sample for sample in scored}


def largest_logprob_difference(samples: Sequence[TrainSample]) -> tuple[float, str]:
    """The largest |proximal - behavior| logprob of a sampled token, and the sample where it is."""
    difference, where = 0.0, ""
    for sample in samples:
        assert sample.proximal_logprobs is not None
        gap = np.abs(sample.proximal_logprobs - sample.behavior_logprobs)[sample.sampled]
        if gap.size and not gap.max() <= difference:
            difference, where = float(gap.max()), sample.sample_id
    return difference, where
