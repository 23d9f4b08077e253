"""An advantage estimator of one's own: the rank within the group, so that only the order of rewards counts."""

from __future__ import annotations

import math

from polyturn.trainer.algorithms.advantages import Advantages, RewardBatch, spread_evenly


def rank_in_group(step: RewardBatch) -> Advantages:
    """From -1 for the worst reward of a group to 1 for the best, equal rewards sharing the mean of their ranks.

    A judge whose scale drifts, or one reward far beyond the others, changes nothing. An episode alone in its group
    leaves the batch.

    Raises:
        ValueError: a reward that is not finite.
    """
    values = [0.0] * len(step.parts)
    trainable = [True] * len(step.parts)
    for part in step.parts:
        if not math.isfinite(part.reward):
            raise ValueError(f"the reward of {part.part_id!r} is {part.reward}")
    for indices in step.groups().values():
        rewards = [step.parts[index].reward for index in indices]
        for index, reward in zip(indices, rewards, strict=True):
            below, above = sum(r < reward for r in rewards), sum(r > reward for r in rewards)
            values[index] = (below - above) / max(len(rewards) - 1, 1)
            trainable[index] = len(rewards) > 1
    return Advantages(
        columns=tuple(spread_evenly(part, value) for part, value in zip(step.parts, values, strict=True)),
        trainable=tuple(trainable),
        metrics={"rank/num_dropped": float(trainable.count(False))},
    )
