"""Random steps of rewards, and what may be done to one without changing what it means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart, TokenColumns

GROUP_SIZES = {"mixed": 4, "pair": 2, "ragged": 3, "alone": 1, "uniform": 3}


def random_step(
    seed: int = 0, *, sizes: Mapping[str, int] | None = None, penalties: bool = False
) -> RewardBatch:
    """Groups of several sizes, one of them with equal rewards, whose parts are interleaved. A part has two to four
    turns with observations between them; every third has a second context, which holds its last turn.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for group_id, size in (sizes or GROUP_SIZES).items():
        for index in range(size):
            reward = 0.5 if group_id == "uniform" else round(float(rng.random()), 3)
            parts.append(_random_part(rng, f"{group_id}.{index}", group_id, reward, penalties=penalties))
    order = rng.permutation(len(parts)).tolist()
    return RewardBatch(parts=tuple(parts[index] for index in order))


def _random_part(
    rng: np.random.Generator, part_id: str, group_id: str, reward: float, *, penalties: bool
) -> RewardPart:
    num_turns = int(rng.integers(2, 5))
    sampled, turns = [False, False], [0, 0]
    for turn in range(num_turns):
        length = int(rng.integers(1, 4))
        sampled += [True] * length + [False] * int(rng.integers(0, 3))
        turns += [turn] * (len(sampled) - len(turns))
    sample = TokenColumns(
        sampled=np.array(sampled),
        turns=np.array(turns, dtype=np.int32),
        values=rng.random(len(sampled)).astype(np.float32),
        penalties=(rng.random(len(sampled)) * 0.01).astype(np.float32) if penalties else None,
    )
    samples = cut(sample, num_turns - 1) if rng.random() < 1 / 3 else (sample,)
    first = round(reward * 0.25, 3)
    steps = [first, *[0.0] * (num_turns - 2), reward - first]
    return RewardPart(
        part_id=part_id,
        group_id=group_id,
        reward=reward,
        samples=samples,
        reward_parts={"task": reward, "format": round(float(rng.random()), 3)},
        turn_rewards=tuple(steps),
        anchors=tuple(f"state-{int(rng.integers(0, 2))}" if turn else "start" for turn in range(num_turns)),
        truncated=bool(rng.random() < 0.3),
    )


def cut(sample: TokenColumns, turn: int) -> tuple[TokenColumns, TokenColumns]:
    """A sample as two: the second has the tokens from a turn on, after a context that is not trained on again."""
    later = sample.turns >= turn
    return replace(sample, sampled=sample.sampled & ~later), replace(sample, sampled=sample.sampled & later)


def map_samples(step: RewardBatch, change: Callable[[TokenColumns], TokenColumns]) -> RewardBatch:
    """The step with each sample changed."""
    return RewardBatch(
        parts=tuple(
            replace(part, samples=tuple(change(sample) for sample in part.samples)) for part in step.parts
        )
    )


def map_columns(sample: TokenColumns, change: Callable[[Any], Any]) -> TokenColumns:
    """The sample with each of its columns changed."""
    return TokenColumns(
        sampled=change(sample.sampled),
        turns=change(sample.turns),
        values=None if sample.values is None else change(sample.values),
        penalties=None if sample.penalties is None else change(sample.penalties),
    )


def without_masked(step: RewardBatch) -> RewardBatch:
    """The step with the tokens deleted that were not sampled."""
    return map_samples(step, lambda sample: map_columns(sample, lambda column: column[sample.sampled]))


def padded(step: RewardBatch, length: int) -> RewardBatch:
    """The step with tokens after each sample that were not sampled."""

    def pad(sample: TokenColumns) -> TokenColumns:
        longer = map_columns(sample, lambda column: np.concatenate([column, np.repeat(column[:1], length)]))
        return replace(longer, sampled=np.concatenate([sample.sampled, np.zeros(length, dtype=np.bool_)]))

    return map_samples(step, pad)


def poisoned(step: RewardBatch, poison: float) -> RewardBatch:
    """The step with `poison` in the float columns of tokens that were not sampled, and nonsense in their turns."""

    def spoil(sample: TokenColumns) -> TokenColumns:
        return replace(
            sample,
            turns=np.where(sample.sampled, sample.turns, 10**6).astype(np.int32),
            values=None
            if sample.values is None
            else np.where(sample.sampled, sample.values, np.float32(poison)),
            penalties=None
            if sample.penalties is None
            else np.where(sample.sampled, sample.penalties, np.float32(poison)),
        )

    return map_samples(step, spoil)


def renamed(step: RewardBatch) -> RewardBatch:
    """The step with other group ids, which sort the other way round."""
    names = sorted({part.group_id for part in step.parts}, reverse=True)
    return RewardBatch(
        parts=tuple(replace(part, group_id=f"g{names.index(part.group_id)}") for part in step.parts)
    )


def split_by_turn(step: RewardBatch) -> RewardBatch:
    """The step with every sample of two or more turns as two, cut before its last turn."""

    def halves(samples: Sequence[TokenColumns]) -> tuple[TokenColumns, ...]:
        result: list[TokenColumns] = []
        for sample in samples:
            turns = sample.turns[sample.sampled]
            last = int(turns.max(initial=0))
            result += cut(sample, last) if turns.size and turns.min() < last else (sample,)
        return tuple(result)

    return RewardBatch(parts=tuple(replace(part, samples=halves(part.samples)) for part in step.parts))


def with_value(step: RewardBatch, index: int, value: float = math.nan) -> RewardBatch:
    """The step with another critic's value at the first sampled token of a part."""
    parts = list(step.parts)
    samples = list(parts[index].samples)
    for place, sample in enumerate(samples):
        if sample.sampled.any() and sample.values is not None:
            values = sample.values.copy()
            values[int(np.flatnonzero(sample.sampled)[0])] = value
            samples[place] = replace(sample, values=values)
            break
    parts[index] = replace(parts[index], samples=tuple(samples))
    return RewardBatch(parts=tuple(parts))
