"""What an advantage estimator is given, and what it gives back.

Tokens of a part form one *trajectory*: the trainable tokens of all its samples in the order in which they were sampled,
by turn and then by position. Tokens that the policy did not sample are no part of it: estimators that recur over tokens
recur over the trajectory, so an observation in between neither ends a return nor discounts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenColumns:
    """The columns of one sample, each of shape [T]; what stands where `sampled` is False means nothing."""

    sampled: npt.NDArray[np.bool_]
    """The trainable mask."""
    turns: npt.NDArray[np.int32]
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


def trajectory(part: RewardPart) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.int32]]:
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
