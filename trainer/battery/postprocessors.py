"""What must hold of every reward post-processing."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from polyturn.trainer.algorithms.advantages import RewardBatch
from polyturn.trainer.algorithms.protocols import RewardPostprocessor
from polyturn.trainer.battery import steps
from polyturn.trainer.battery.rows import require


def process(postprocessor: RewardPostprocessor, step: RewardBatch) -> list[float]:
    """The new rewards."""
    rewards = postprocessor([part.reward for part in step.parts], step.parts)
    require(len(rewards) == len(step.parts), f"{len(rewards)} rewards for {len(step.parts)} parts")
    return [float(reward) for reward in rewards]


def _require_same(found: Sequence[float], expected: Sequence[float], what: str) -> None:
    same = all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(found, expected, strict=True))
    require(same, f"{what} changes the rewards from {list(expected)} to {list(found)}")


def check_form(postprocessor: RewardPostprocessor, seed: int) -> None:
    """One finite reward for each part; none of none."""
    rewards = process(postprocessor, steps.random_step(seed))
    require(all(math.isfinite(reward) for reward in rewards), f"a reward is not finite: {rewards}")
    require(not process(postprocessor, RewardBatch(parts=())), "a step without parts has rewards")


def check_masked_slots(postprocessor: RewardPostprocessor, seed: int) -> None:
    """What was not sampled changes nothing: deleted, padded, or with nonsense in it."""
    step = steps.random_step(seed)
    expected = process(postprocessor, step)
    _require_same(
        process(postprocessor, steps.without_masked(step)), expected, "deleting what was not sampled"
    )
    _require_same(process(postprocessor, steps.padded(step, 5)), expected, "padding")
    _require_same(
        process(postprocessor, steps.poisoned(step, math.nan)), expected, "NaN where nothing was sampled"
    )


def check_permutation(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The order of the parts changes nothing."""
    step = steps.random_step(seed)
    order = np.random.default_rng(seed).permutation(len(step.parts)).tolist()
    expected = process(postprocessor, step)
    shuffled = RewardBatch(parts=tuple(step.parts[index] for index in order))
    _require_same(
        process(postprocessor, shuffled), [expected[index] for index in order], "the order of the parts"
    )


def check_segments(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The same tokens in more contexts change nothing."""
    step = steps.random_step(seed)
    _require_same(
        process(postprocessor, steps.split_by_turn(step)),
        process(postprocessor, step),
        "another cut into contexts",
    )


def check_purity(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The rewards that came in are not changed, and the same ones give the same result."""
    step = steps.random_step(seed)
    rewards = [part.reward for part in step.parts]
    given = copy.copy(rewards)
    first = list(postprocessor(given, step.parts))
    require(given == rewards, "the rewards that came in are changed")
    _require_same(list(postprocessor(given, step.parts)), first, "a second call")


def check_chain(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The rewards so far count, not those that the parts were played for: one step may follow another."""
    step = steps.random_step(seed)
    moved = [part.reward + 0.25 for part in step.parts]
    first = list(postprocessor([part.reward for part in step.parts], step.parts))
    require(
        list(postprocessor(moved, step.parts)) != first,
        "the rewards that an earlier step made are passed over",
    )


def check_nan_shows(postprocessor: RewardPostprocessor, seed: int) -> None:
    """A reward of NaN is refused with a ValueError, or stays NaN."""
    step = steps.random_step(seed)
    for index in range(len(step.parts)):
        rewards = [math.nan if i == index else part.reward for i, part in enumerate(step.parts)]
        try:
            found = postprocessor(rewards, step.parts)
        except ValueError:
            continue
        require(math.isnan(found[index]), f"a reward of NaN becomes {found[index]}")


CHECKS = {
    "form": check_form,
    "masked_slots": check_masked_slots,
    "permutation": check_permutation,
    "segments": check_segments,
    "purity": check_purity,
    "chain": check_chain,
    "nan_shows": check_nan_shows,
}
