"""From the rewards and the scored samples of a step to what each token is worth.

This is where the whole step is in one place, before it is cut into updates, ranks and micro-batches: means, deviations
and counts taken here are global.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from polyturn.configs.algorithm import Advantage, AlgorithmConfig, GroupAdvantage
from polyturn.trainer.algorithms.advantages import GroupAdvantages, group_advantages
from polyturn.trainer.batch import TrainSample
from polyturn.trainer.samples import StepSamples


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """The samples to train on, with their advantages, and what became of the step's groups."""

    samples: tuple[TrainSample, ...]
    advantages: dict[str, float]
    """By `Part.part_id`."""
    groups: GroupAdvantages


def estimate_advantages(
    step: StepSamples, scored: Mapping[str, TrainSample], algorithm: AlgorithmConfig
) -> Estimates:
    """Compare each part's reward with its group's. What is alone in its group is left out.

    Args:
        scored: the step's samples with the logprobs that the algorithm asks for, by sample id.
    """
    parts = step.parts
    groups = _advantages(
        [part.reward for part in parts], [part.group_id for part in parts], algorithm.advantage
    )
    samples = tuple(
        _with_advantage(scored[sample.sample_id], advantage)
        for part, advantage, trainable in zip(parts, groups.advantages, groups.trainable, strict=True)
        for sample in part.samples
        if trainable
    )
    advantages = {part.part_id: value for part, value in zip(parts, groups.advantages, strict=True)}
    return Estimates(samples=samples, advantages=advantages, groups=groups)


def _with_advantage(sample: TrainSample, advantage: float) -> TrainSample:
    return replace(sample, advantages=np.where(sample.sampled, advantage, 0.0).astype(np.float32))


def _advantages(rewards: Sequence[float], group_ids: Sequence[str], config: Advantage) -> GroupAdvantages:
    if isinstance(config, GroupAdvantage):
        return group_advantages(
            rewards, group_ids, kind="grpo", epsilon=config.epsilon, min_spread=config.min_spread
        )
    return group_advantages(rewards, group_ids, kind="dr_grpo")
