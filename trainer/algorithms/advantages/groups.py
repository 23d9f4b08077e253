"""Advantages of episodes from their rewards, by group.

A group is the set of episodes of one task that share a baseline. Membership is by group id: neither the order of the
episodes nor equal prompts nor missing episodes matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupAdvantages:
    """Advantages of E episodes, in their order."""

    advantages: tuple[float, ...]
    trainable: tuple[bool, ...]
    """False for an episode alone in its group: it has nothing to be compared with, so it leaves the batch."""
    num_groups: int
    num_singleton_groups: int
    num_uniform_groups: int
    """Groups whose rewards do not differ, singletons not counted: their advantages are 0."""


def group_advantages(
    rewards: Sequence[float],
    group_ids: Sequence[str],
    *,
    kind: Literal["grpo", "dr_grpo"] = "grpo",
    epsilon: float = 1e-6,
    min_spread: float = 0.0,
) -> GroupAdvantages:
    """Compare each episode's reward with its group's.

    grpo (arXiv 2402.03300): (r - mean) / (std + epsilon), std with n - 1 in the denominator. A group whose largest and
    smallest reward differ by less than `min_spread`, or not at all, has advantages of exactly 0: dividing by its std
    would blow noise up.
    dr_grpo (arXiv 2503.20783): r - mean.

    Raises:
        ValueError: a reward that is not finite.
    """
    assert len(rewards) == len(group_ids), "one group id for each reward"
    members: dict[str, list[int]] = {}
    for i, (reward, group_id) in enumerate(zip(rewards, group_ids, strict=True)):
        if not math.isfinite(reward):
            raise ValueError(f"the reward of an episode of group {group_id!r} is {reward}")
        members.setdefault(group_id, []).append(i)
    advantages = [0.0] * len(rewards)
    trainable = [True] * len(rewards)
    num_singletons = num_uniform = 0
    for indices in members.values():
        if len(indices) == 1:
            trainable[indices[0]] = False
            num_singletons += 1
            continue
        values = [float(rewards[i]) for i in indices]
        spread = max(values) - min(values)
        if spread == 0.0 or (kind == "grpo" and spread < min_spread):
            num_uniform += 1
            continue
        mean = math.fsum(values) / len(values)
        scale = 1.0
        if kind == "grpo":
            scale = (
                math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)) + epsilon
            )
        for i, value in zip(indices, values, strict=True):
            advantages[i] = (value - mean) / scale
    return GroupAdvantages(
        advantages=tuple(advantages),
        trainable=tuple(trainable),
        num_groups=len(members),
        num_singleton_groups=num_singletons,
        num_uniform_groups=num_uniform,
    )
