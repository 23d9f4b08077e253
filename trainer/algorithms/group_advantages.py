"""Advantages of whole episodes, from comparing their rewards within their group.

Membership is by group id: neither the order of the episodes nor equal prompts nor missing episodes matter. In the
formulas r is the reward (less the KL penalty where that is part of it), mean and std are those of the group, std with
n - 1 in the denominator.
"""

from __future__ import annotations

import math

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.algorithm import (
    CentredAdvantage,
    GDPOAdvantage,
    GPGAdvantage,
    GroupAdvantage,
    LeaveOneOutAdvantage,
    MaxRLAdvantage,
    NoAdvantage,
    OptimalBaselineAdvantage,
)
from polyturn.trainer.algorithms.advantages import (
    Advantages,
    Compared,
    Group,
    RewardBatch,
    by_group,
    by_outcome,
    deviation,
    finish_compared,
    mean,
    outcomes,
    own_rewards,
    standardize,
    telling_rewards,
)
from polyturn.trainer.algorithms.registry import ADVANTAGES


@ADVANTAGES.register("none", formula="A = 0", paper="Thinking Machines 2025", config=NoAdvantage)
def no_advantage(step: RewardBatch, config: NoAdvantage) -> Advantages:
    """Nothing is compared, and nothing left out: what a teacher says of each token is added elsewhere."""
    compared = Compared(
        advantages=(0.0,) * len(step.parts),
        trainable=(True,) * len(step.parts),
        uniform=(False,) * len(step.parts),
        metrics={},
    )
    return finish_compared(step, compared, config=config)


@ADVANTAGES.register(
    "grpo",
    formula="A = (r - mean) / (std + epsilon)",
    paper="2402.03300",
    config=GroupAdvantage,
    gradients={"loss": "biased"},
)
def grpo(step: RewardBatch, config: GroupAdvantage) -> Advantages:
    """GRPO. A group whose rewards differ by less than `min_spread` has advantages of exactly 0."""

    def compare(group: Group) -> list[float]:
        return standardize(group.values, epsilon=config.epsilon)

    compared = by_outcome(step, compare, config=config, min_spread=config.min_spread)
    return finish_compared(step, compared, config=config)


@ADVANTAGES.register(
    "dr_grpo",
    formula="A = r - mean",
    paper="2503.20783",
    config=CentredAdvantage,
    gradients={"loss": "scaled_policy_gradient"},
)
def dr_grpo(step: RewardBatch, config: CentredAdvantage) -> Advantages:
    """Dr.GRPO: nothing is divided by, neither here nor, with its reduction, by an answer's length."""
    return finish_compared(step, by_outcome(step, _centre, config=config), config=config)


@ADVANTAGES.register(
    "rloo",
    formula="A = r - mean of the others = G / (G - 1) (r - mean)",
    paper="2402.14740",
    config=LeaveOneOutAdvantage,
    gradients={"loss": "policy_gradient"},
)
def rloo(step: RewardBatch, config: LeaveOneOutAdvantage) -> Advantages:
    """RLOO: the baseline knows nothing of the episode itself, so the gradient is unbiased."""

    def compare(group: Group) -> list[float]:
        size = len(group.values)
        return [size / (size - 1) * value for value in _centre(group)]

    return finish_compared(step, by_outcome(step, compare, config=config), config=config)


@ADVANTAGES.register(
    "gpg",
    formula="A = (r - mean) * episodes / episodes of groups that are not uniform",
    paper="2504.02546",
    config=GPGAdvantage,
    gradients={"loss": "biased"},
)
def gpg(step: RewardBatch, config: GPGAdvantage) -> Advantages:
    """GPG: what uniform groups leave out is made up for by the others. Singletons count on neither side."""
    compared = by_outcome(step, _centre, config=config)
    sizes = {group_id: len(indices) for group_id, indices in step.groups().items()}
    several = [sizes[part.group_id] > 1 for part in step.parts]
    telling = sum(among and not flat for among, flat in zip(several, compared.uniform, strict=True))
    scale = sum(several) / telling if telling else 1.0
    scaled = Compared(
        advantages=tuple(
            value * scale if among else value
            for value, among in zip(compared.advantages, several, strict=True)
        ),
        trainable=compared.trainable,
        uniform=compared.uniform,
        metrics={**compared.metrics, "advantage/gpg_scale": scale},
    )
    return finish_compared(step, scaled, config=config)


@ADVANTAGES.register(
    "opo",
    formula="A = r - sum(length * r) / sum(length)",
    paper="2505.23585",
    config=OptimalBaselineAdvantage,
    gradients={"loss": "biased"},
)
def opo(step: RewardBatch, config: OptimalBaselineAdvantage) -> Advantages:
    """OPO: the baseline of least variance where the gradients of tokens are alike. Lengths are of trainable tokens."""
    lengths = [part.num_trainable for part in step.parts]

    def compare(group: Group) -> list[float]:
        total = sum(lengths[index] for index in group.indices)
        if total == 0:
            return [0.0] * len(group.values)
        weighted = [lengths[i] * value for i, value in zip(group.indices, group.values, strict=True)]
        baseline = math.fsum(weighted) / total
        return [value - baseline for value in group.values]

    return finish_compared(step, by_outcome(step, compare, config=config), config=config)


@ADVANTAGES.register(
    "maxrl",
    formula="A = (r - mean) / mean; 0 where mean < min_mean",
    paper="2602.02710",
    config=MaxRLAdvantage,
    gradients={"loss": "biased"},
)
def maxrl(step: RewardBatch, config: MaxRLAdvantage) -> Advantages:
    """MaxRL: the gradient of log E[r] to the order that the group's size allows, for rewards of 0 and more.

    Raises:
        ValueError: the task paid less than 0.
    """
    for part, reward in zip(step.parts, own_rewards(step), strict=True):
        if reward < 0:
            raise ValueError(
                f"maxrl: {part.part_id!r} of group {part.group_id!r} has the reward {reward}, and the logarithm of an "
                "expected reward needs rewards of 0 and more: choose another advantage.kind, or pay 0 for the worst"
            )
    low = []

    def compare(group: Group) -> list[float]:
        centre = mean(group.values)
        if centre < config.min_mean:
            low.append(group.group_id)
            return [0.0] * len(group.values)
        return [(value - centre) / centre for value in group.values]

    compared = by_outcome(step, compare, config=config)
    counted = Compared(
        advantages=compared.advantages,
        trainable=compared.trainable,
        uniform=compared.uniform,
        metrics={**compared.metrics, "group/num_low_mean": float(len(low))},
    )
    return finish_compared(step, counted, config=config)


@ADVANTAGES.register(
    "gdpo",
    formula="A = normalize over the batch(sum over parts k of w_k (r_k - mean_k) / (std_k + epsilon))",
    paper="2601.05242",
    config=GDPOAdvantage,
    gradients={"loss": "biased"},
)
def gdpo(step: RewardBatch, config: GDPOAdvantage) -> Advantages:
    """GDPO: a part of the reward with small numbers has as much to say as one with large ones.

    An episode without one of the parts has 0 of it; without any parts, `reward` is the only one. A part that does not
    differ within a group, or by less than `min_spread`, says nothing there; a group is uniform if no part does.
    """
    outcomes(step)
    found_parts = {name for part in step.parts for name in part.reward_parts}
    for name in config.weights:
        if name not in found_parts:
            near = (
                did_you_mean(name, found_parts)
                or f"; the parts are {', '.join(sorted(found_parts)) or 'none'}"
            )
            raise ValueError(f"gdpo: no episode of the step has a reward part {name!r}{near}")
    names = sorted(config.weights or found_parts)
    columns = [[part.reward_parts.get(name, 0.0) for part in step.parts] for name in names]
    if not names:
        names, columns = ["reward"], [[part.reward for part in step.parts]]

    def compare(group: Group) -> list[float]:
        return standardize(group.values, epsilon=config.epsilon)

    told_by = telling_rewards(step, config) if config.uniform_by else None
    by_part = [
        by_group(step, column, compare, config=config, min_spread=config.min_spread, telling=told_by)
        for column in columns
    ]
    weights = [config.weights.get(name, 1.0) for name in names]
    sums = [
        math.fsum(w * found.advantages[i] for w, found in zip(weights, by_part, strict=True))
        for i in range(len(step.parts))
    ]
    uniform = tuple(all(found.uniform[i] for found in by_part) for i in range(len(step.parts)))
    trainable = tuple(any(found.trainable[i] for found in by_part) for i in range(len(step.parts)))
    kept = [value for value, keep in zip(sums, trainable, strict=True) if keep]
    if config.normalize_batch and len(kept) > 1:
        flat = max(kept) == min(kept)
        centre, scale = mean(kept), deviation(kept) + config.epsilon
        sums = [
            0.0 if flat or not keep else (v - centre) / scale for v, keep in zip(sums, trainable, strict=True)
        ]
    telling = {part.group_id for part, flat in zip(step.parts, uniform, strict=True) if flat}
    metrics = {**by_part[0].metrics, "group/num_uniform": float(len(telling)), "group/num_near_uniform": 0.0}
    compared = Compared(advantages=tuple(sums), trainable=trainable, uniform=uniform, metrics=metrics)
    return finish_compared(step, compared, config=config)


def _centre(group: Group) -> list[float]:
    centre = mean(group.values)
    return [value - centre for value in group.values]
