"""Comparing values within groups: exact means, what counts as uniform, and what becomes of the lonely."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.algorithm import GroupedSection
from polyturn.trainer.algorithms.advantages.types import RewardBatch, along

ROUNDING = 1e-14
"""Relative, of numbers below 1 absolute: 0.1 + 0.2 is another float than 0.3, and the same reward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The parts that are compared with each other."""

    group_id: str
    indices: tuple[int, ...]
    """Of its parts in the batch."""
    values: tuple[float, ...]
    """What they are compared by."""

    @property
    def spread(self) -> float:
        return spread(self.values)


Compare = Callable[[Group], Sequence[float]]
"""From a group of two or more whose values differ to the advantage of each of its parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One number for each part, in their order."""

    advantages: tuple[float, ...]
    trainable: tuple[bool, ...]
    uniform: tuple[bool, ...]
    """Parts of groups of two or more whose values do not differ, or too little."""
    metrics: Mapping[str, float]


def outcomes(step: RewardBatch) -> tuple[float, ...]:
    """The reward of each part less all its penalties."""
    return tuple(
        float(part.reward) - math.fsum(along(part, [sample.penalties for sample in part.samples]))
        if any(sample.penalties is not None for sample in part.samples)
        else float(part.reward)
        for part in step.parts
    )


def own_rewards(step: RewardBatch) -> tuple[float, ...]:
    """What the task paid each part: neither shaped nor less penalties."""
    return tuple(float(part.own.reward) for part in step.parts)


def telling_rewards(step: RewardBatch, config: GroupedSection) -> tuple[float, ...]:
    """What says whether the parts of a group differ: what the task paid for all, or for what the config names.

    Raises:
        ValueError: no part of the step's rewards has the name that the config gives.
    """
    name = config.uniform_by
    if name is None:
        return own_rewards(step)
    known = {known for part in step.parts for known in part.reward_parts}
    if step.parts and name not in known:
        near = did_you_mean(name, known) or f"; the parts are {', '.join(sorted(known)) or 'none'}"
        raise ValueError(f"uniform_by: no episode of the step has a reward part {name!r}{near}")
    return tuple(part.reward_parts.get(name, 0.0) for part in step.parts)


def spread(values: Sequence[float]) -> float:
    """The largest value less the smallest; 0 where they differ by no more than sums of the same numbers may."""
    low, high = min(values), max(values)
    return 0.0 if high - low <= ROUNDING * max(1.0, abs(low), abs(high)) else high - low


def mean(values: Sequence[float]) -> float:
    """Correctly rounded sums, so the mean of equal numbers is that number up to one rounding, in any order."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation with n - 1 in the denominator."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def standardize(values: Sequence[float], *, epsilon: float) -> list[float]:
    """(value - mean) / (standard deviation + epsilon)."""
    centre, scale = mean(values), deviation(values) + epsilon
    return [(value - centre) / scale for value in values]


def by_group(
    step: RewardBatch,
    values: Sequence[float],
    compare: Compare,
    *,
    config: GroupedSection,
    min_spread: float = 0.0,
    telling: Sequence[float] | None = None,
    staying: Sequence[float] | None = None,
) -> Compared:
    """Compare the values within each group; `config` says what becomes of singletons and uniform groups.

    Args:
        values: One for each part.
        min_spread: A group whose largest and smallest value differ by less counts as uniform.
        telling: By these a group is uniform or not, where the values hold more than that; None: by the values.
        staying: What uniform groups that stay are compared by; None: by what told them.
    """
    telling = values if telling is None else telling
    staying = telling if staying is None else staying
    groups = [_group(group_id, indices, telling) for group_id, indices in step.groups().items()]
    advantages = [0.0] * len(values)
    trainable = [True] * len(values)
    uniform = [False] * len(values)
    for group in groups:
        if len(group.indices) == 1:
            (index,) = group.indices
            trainable[index] = config.singletons != "drop"
            if config.singletons == "batch_mean":
                advantages[index] = _against_the_rest(values, index)
        elif group.spread == 0.0 or group.spread < min_spread:
            for index in group.indices:
                uniform[index] = True
                trainable[index] = config.uniform != "drop"
            rest = _group(group.group_id, group.indices, staying)
            if rest.spread > 0.0 and rest.spread >= min_spread:
                _fill(advantages, rest, compare)
        else:
            _fill(advantages, _group(group.group_id, group.indices, values), compare)
    return Compared(
        advantages=tuple(advantages),
        trainable=tuple(trainable),
        uniform=tuple(uniform),
        metrics=group_metrics(groups, min_spread=min_spread),
    )


def by_outcome(
    step: RewardBatch, compare: Compare, *, config: GroupedSection, min_spread: float = 0.0
) -> Compared:
    """Compare the rewards within each group, shaped and less penalties, where the task's own rewards differ.

    Four wrong answers are alike, whichever of them is too long: what shaping adds orders the answers of a group that
    has something to tell, and makes no group tell anything. Where uniform groups stay, what is left to them is the
    penalties, which are of the policy and not of the task.
    """
    values, telling = outcomes(step), telling_rewards(step, config)
    staying = [
        told - (part.reward - value) for told, part, value in zip(telling, step.parts, values, strict=True)
    ]
    return by_group(
        step, values, compare, config=config, min_spread=min_spread, telling=telling, staying=staying
    )


def group_metrics(groups: Sequence[Group], *, min_spread: float) -> dict[str, float]:
    """How many groups there are of each kind that a policy is stated for."""
    sizes = [len(group.indices) for group in groups]
    several = [group for group in groups if len(group.indices) > 1]
    return {
        "group/num_compared": float(len(groups)),
        "group/num_singleton": float(len(groups) - len(several)),
        "group/num_uniform": float(sum(group.spread == 0.0 for group in several)),
        "group/num_near_uniform": float(sum(0.0 < group.spread < min_spread for group in several)),
        "group/num_ragged": float(sum(size < max(sizes) for size in sizes)),
        "group/size_min": float(min(sizes, default=0)),
        "group/size_max": float(max(sizes, default=0)),
    }


def _group(group_id: str, indices: Sequence[int], values: Sequence[float]) -> Group:
    return Group(group_id=group_id, indices=tuple(indices), values=tuple(values[i] for i in indices))


def _fill(advantages: list[float], group: Group, compare: Compare) -> None:
    for index, advantage in zip(group.indices, compare(group), strict=True):
        advantages[index] = advantage


def _against_the_rest(values: Sequence[float], index: int) -> float:
    rest = np.delete(np.asarray(values, dtype=np.float64), index)
    return values[index] - mean(rest.tolist()) if len(rest) else 0.0
