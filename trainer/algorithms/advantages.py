"""From the rewards of a step to what each of its tokens is worth: what estimators get, give back and have in common.

The estimators themselves are in `group_advantages` and `token_advantages`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.algorithm import AdvantageSection, GroupedSection

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenColumns:
    """The columns of one sample, each of shape [T]; what stands where `sampled` is False means nothing."""

    sampled: npt.NDArray[np.bool_]
    """The trainable mask."""
    turns: npt.NDArray[np.signedinteger]
    """The turn of each token, counted within the part."""
    values: Float32 | None = None
    """What the critic expects at each token before it is sampled; None without a critic."""
    penalties: Float32 | None = None
    """Taken from the reward token by token: coefficient times KL estimate, where the KL is in the reward; else None."""

    def __post_init__(self) -> None:
        columns = (self.sampled, self.turns, self.values, self.penalties)
        shapes = {column.shape for column in columns if column is not None}
        assert len(shapes) == 1, f"columns of shapes {shapes}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RewardPart:
    """What shares one reward: an episode, or what one role wrote in it."""

    part_id: str
    group_id: str
    """Parts with one group id are compared with each other, in whatever order they stand."""
    reward: float
    samples: tuple[TokenColumns, ...] = ()
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    """The reward's components by name; they need not add up to it."""
    turn_rewards: tuple[float, ...] = ()
    """The reward by turn; they add up to `reward`. Empty where all of it came at the end."""
    anchors: tuple[str, ...] = ()
    """By turn, a digest of the state in which it was taken; empty where nothing is known of the states."""
    truncated: bool = False
    """A limit ended the episode, not the task."""
    parent_id: str = ""
    """The `part_id` that this one is a branch of: it begins with the other's turns, which are trained on there."""
    branch_turn: int = 0
    """The first turn of its own; 0 where it is no branch."""
    unshaped: RewardPart | None = None
    """The part as the task paid it, where post-processing made another reward of that; None: it is as it was."""

    @property
    def own(self) -> RewardPart:
        """With the task's own reward, which says whether a group has anything to tell: shaping only orders it."""
        return self.unshaped or self

    def __post_init__(self) -> None:
        """Raises `ValueError` for a number that is not finite: minima, maxima and sums would hide or spread it."""
        values = {"the reward": self.reward, **self.reward_parts}
        values |= {f"the reward of turn {turn}": value for turn, value in enumerate(self.turn_rewards)}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"group {self.group_id!r}: {name} of {self.part_id!r} is {value}")

    @property
    def num_trainable(self) -> int:
        """Trainable tokens over all samples."""
        return sum(int(sample.sampled.sum()) for sample in self.samples)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RewardBatch:
    """All parts of a step, in any order: every statistic is one of the whole step."""

    parts: tuple[RewardPart, ...]

    @property
    def own(self) -> RewardBatch:
        """The same with the rewards that the tasks paid, before they were shaped."""
        return RewardBatch(parts=tuple(part.own for part in self.parts))

    def groups(self) -> dict[str, list[int]]:
        """The positions of each group's parts."""
        members: dict[str, list[int]] = {}
        for index, part in enumerate(self.parts):
            members.setdefault(part.group_id, []).append(index)
        return members


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Advantages:
    """The advantages of a step's tokens, in the order of its parts and their samples."""

    columns: tuple[tuple[Float32, ...], ...]
    """By part and sample, shape [T], 0 where nothing was sampled."""
    trainable: tuple[bool, ...]
    """By part: False for what leaves the batch, such as a part that has nothing to be compared with."""
    returns: tuple[tuple[Float32, ...], ...] | None = None
    """What the critic should have expected, as `columns`; None where the estimator has no use for a critic."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the step, such as the number of groups that do not differ."""

    def mean(self, batch: RewardBatch) -> tuple[float, ...]:
        """By part: the mean over its trainable tokens, 0 where there are none."""
        return tuple(
            float(np.concatenate([column[sample.sampled] for column, sample in pairs]).mean())
            if any(sample.sampled.any() for _, sample in pairs)
            else 0.0
            for pairs in (
                list(zip(columns, part.samples, strict=True))
                for columns, part in zip(self.columns, batch.parts, strict=True)
            )
        )


def trajectory(
    part: RewardPart,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.signedinteger]]:
    """The part's trainable tokens in the order in which they were sampled: sample, position and turn of each, [N]."""
    if not part.samples:
        nothing = np.zeros(0, dtype=np.intp)
        return nothing, nothing, nothing.astype(np.int32)
    positions = [np.flatnonzero(sample.sampled) for sample in part.samples]
    samples = np.repeat(np.arange(len(positions)), [len(found) for found in positions])
    places = np.concatenate(positions)
    turns = np.concatenate(
        [sample.turns[found] for sample, found in zip(part.samples, positions, strict=True)]
    )
    order = np.argsort(turns, kind="stable")
    return samples[order], places[order], turns[order]


def along(part: RewardPart, columns: Sequence[Float32 | None]) -> Float64:
    """A column of each sample, read along the part's trajectory, [N]; a column that is None reads as 0."""
    samples, places, _ = trajectory(part)
    values = np.zeros(len(places))
    for index, column in enumerate(columns):
        if column is not None:
            here = samples == index
            values[here] = column[places[here]]
    return values


def back(part: RewardPart, values: npt.NDArray[np.floating]) -> tuple[Float32, ...]:
    """Values along the part's trajectory, [N], as a column of each sample, 0 where nothing was sampled."""
    samples, places, _ = trajectory(part)
    columns = tuple(np.zeros(sample.sampled.shape, dtype=np.float32) for sample in part.samples)
    for index, column in enumerate(columns):
        here = samples == index
        column[places[here]] = values[here]
    return columns


def spread_evenly(part: RewardPart, value: float) -> tuple[Float32, ...]:
    """One value at every trainable token."""
    return tuple(np.where(sample.sampled, value, 0.0).astype(np.float32) for sample in part.samples)


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


WHITENING_EPSILON = 1e-8


def finish(
    step: RewardBatch,
    advantages: Sequence[Float64],
    *,
    config: AdvantageSection,
    trainable: Sequence[bool] | None = None,
    returns: tuple[tuple[Float32, ...], ...] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Advantages:
    """What an estimator gives back, from the advantages along each part's trajectory, [N] each.

    Args:
        trainable: By part; None: all.
    """
    kept = [True] * len(step.parts) if trainable is None else list(trainable)
    if config.whiten:
        advantages = whiten(advantages, kept)
    tokens = _tokens(advantages, kept)
    figures = {
        "advantage/mean": float(tokens.mean()) if tokens.size else 0.0,
        "advantage/std": float(tokens.std()) if tokens.size else 0.0,
        "advantage/abs_max": float(np.abs(tokens).max()) if tokens.size else 0.0,
        "advantage/zero_fraction": float((tokens == 0).mean()) if tokens.size else 0.0,
    }
    return Advantages(
        columns=tuple(back(part, values) for part, values in zip(step.parts, advantages, strict=True)),
        trainable=tuple(kept),
        returns=returns,
        metrics={**figures, **(metrics or {})},
    )


def finish_compared(step: RewardBatch, compared: Compared, *, config: AdvantageSection) -> Advantages:
    """As `finish`, with one number for all tokens of a part."""
    return finish(
        step,
        [
            np.full(len(trajectory(part)[0]), value)
            for part, value in zip(step.parts, compared.advantages, strict=True)
        ],
        config=config,
        trainable=compared.trainable,
        metrics=compared.metrics,
    )


def whiten(advantages: Sequence[Float64], trainable: Sequence[bool]) -> list[Float64]:
    """(A - mean) / standard deviation, both over all tokens of the parts that are trained on, n - 1 in the latter.

    Advantages that do not differ become exactly 0.
    """
    tokens = _tokens(advantages, trainable)
    if tokens.size < 2 or np.ptp(tokens) == 0.0:
        return [np.zeros_like(values) for values in advantages]
    mean, scale = tokens.mean(), tokens.std(ddof=1) + WHITENING_EPSILON
    return [(values - mean) / scale for values in advantages]


def _tokens(advantages: Sequence[Float64], trainable: Sequence[bool]) -> Float64:
    kept = [values for values, keep in zip(advantages, trainable, strict=True) if keep]
    return np.concatenate(kept) if kept else np.zeros(0)
