"""What must hold of everything that is made of a step's rewards: every advantage estimator and post-processing."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from polyturn.trainer.algorithms.advantages import Advantages, Float32, RewardBatch
from polyturn.trainer.algorithms.protocols import AdvantageEstimator, RewardPostprocessor
from polyturn.trainer.battery import steps
from polyturn.trainer.battery.invariances import BatteryFailure, Check, require

TOLERANCE = 2e-6
"""Columns are float32."""


def trained(step: RewardBatch, result: Advantages, *, returns: bool = False) -> list[Float32]:
    """By part: the advantages, or returns, of its trainable tokens, sample after sample."""
    columns = result.returns if returns else result.columns
    assert columns is not None
    nothing = [np.zeros(0, dtype=np.float32)]
    return [
        np.concatenate(
            nothing + [column[sample.sampled] for column, sample in zip(found, part.samples, strict=True)]
        )
        for found, part in zip(columns, step.parts, strict=True)
    ]


def _require_same(
    found: list[Float32], expected: list[Float32], what: str, tolerance: float = TOLERANCE
) -> None:
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        require(ours.shape == theirs.shape, f"{what} changes the number of advantages of part {index}")
        gap = np.abs(ours.astype(float) - theirs.astype(float)) / np.maximum(1, np.abs(theirs))
        if not (gap <= tolerance).all():
            worst = int(np.where(np.isnan(gap), np.inf, gap).argmax())
            raise BatteryFailure(
                f"{what} changes the advantage of token {worst} of part {index} from {theirs[worst]:.9g} to "
                f"{ours[worst]:.9g}"
            )


def _require_same_results(
    estimator: AdvantageEstimator,
    changed: RewardBatch,
    step: RewardBatch,
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    found, expected = estimator(changed), estimator(step)
    _require_same(trained(changed, found), trained(step, expected), what, tolerance)
    require(found.trainable == expected.trainable, f"{what} changes which parts are trained on")
    if expected.returns is not None:
        theirs = trained(step, expected, returns=True)
        _require_same(trained(changed, found, returns=True), theirs, f"{what}, for the critic,", tolerance)


def check_form(estimator: AdvantageEstimator, seed: int) -> None:
    """float32 columns of the samples' shapes, finite, 0 where nothing was sampled; a flag for each part."""
    step = steps.random_step(seed)
    result = estimator(step)
    require(
        len(result.columns) == len(result.trainable) == len(step.parts),
        f"{len(result.columns)} columns and {len(result.trainable)} flags for {len(step.parts)} parts",
    )
    for part, columns in zip(step.parts, result.columns, strict=True):
        require(len(columns) == len(part.samples), f"{len(columns)} columns for {len(part.samples)} samples")
        for sample, column in zip(part.samples, columns, strict=True):
            require(
                column.dtype == np.float32 and column.shape == sample.sampled.shape,
                f"a column is {column.dtype} {column.shape}, not float32 {sample.sampled.shape}",
            )
            require(bool(np.isfinite(column).all()), "an advantage is not finite though all rewards are")
            require(not column[~sample.sampled].any(), "a token that was not sampled has an advantage")
    for name, value in result.metrics.items():
        require(math.isfinite(value), f"the metric {name} is {value}")


def check_deletion(estimator: AdvantageEstimator, seed: int) -> None:
    """Deleting what was not sampled changes nothing: no recursion ends at an observation, or discounts it."""
    step = steps.random_step(seed)
    _require_same_results(
        estimator, steps.without_masked(step), step, "deleting what was not sampled", tolerance=0.0
    )


def check_poison(estimator: AdvantageEstimator, seed: int) -> None:
    """Whatever stands at tokens that were not sampled changes nothing."""
    for penalties in (False, True):
        step = steps.random_step(seed, penalties=penalties)
        if penalties and _refuses(estimator, step):
            return
        for poison in (math.nan, math.inf, 1e9):
            changed = steps.poisoned(step, poison)
            _require_same_results(
                estimator, changed, step, f"{poison} where nothing was sampled", tolerance=0.0
            )


def check_padding(estimator: AdvantageEstimator, seed: int) -> None:
    """Tokens after a sample that were not sampled change nothing."""
    step = steps.random_step(seed)
    _require_same_results(estimator, steps.padded(step, 3), step, "padding", tolerance=0.0)


def check_permutation(estimator: AdvantageEstimator, seed: int) -> None:
    """The order of the parts changes nothing: groups are by id, not by position."""
    step = steps.random_step(seed)
    order = np.random.default_rng(seed).permutation(len(step.parts)).tolist()
    shuffled = RewardBatch(parts=tuple(step.parts[index] for index in order))
    found, expected = estimator(shuffled), estimator(step)
    theirs = trained(step, expected)
    _require_same(trained(shuffled, found), [theirs[index] for index in order], "the order of the parts")
    flags = tuple(expected.trainable[index] for index in order)
    require(found.trainable == flags, "the order of the parts changes which are trained on")


def check_names(estimator: AdvantageEstimator, seed: int) -> None:
    """What the groups are called changes nothing."""
    step = steps.random_step(seed)
    _require_same_results(estimator, steps.renamed(step), step, "renaming the groups")


def check_segments(estimator: AdvantageEstimator, seed: int) -> None:
    """The same tokens in more contexts have the same advantages: a part is one trajectory over all of them."""
    step = steps.random_step(seed)
    changed = steps.split_by_turn(step)
    found, expected = _in_order(changed, estimator(changed)), _in_order(step, estimator(step))
    _require_same(found, expected, "another cut into contexts")


def _in_order(step: RewardBatch, result: Advantages) -> list[Float32]:
    """As `trained`, by turn: contexts may come in another order than their turns."""
    ordered = []
    for values, part in zip(trained(step, result), step.parts, strict=True):
        turns = [sample.turns[sample.sampled] for sample in part.samples]
        ordered.append(values[np.argsort(np.concatenate(turns), kind="stable")] if turns else values)
    return ordered


def check_edges(estimator: AdvantageEstimator, seed: int) -> None:
    """All rewards equal, one group, one part, none: finite advantages, and no advantage from equal rewards alone."""
    for sizes in ({"uniform": 4}, {"uniform": 2, "mixed": 1}, {"alone": 1}, {"mixed": 2}):
        step = steps.random_step(seed, sizes=sizes)
        for values in trained(step, estimator(step)):
            require(
                bool(np.isfinite(values).all()), f"an advantage is not finite where the groups are {sizes}"
            )
    require(not estimator(RewardBatch(parts=())).columns, "a step without parts has advantages")


def check_purity(estimator: AdvantageEstimator, seed: int) -> None:
    """The step is not changed, and the same step has the same advantages."""
    step = steps.random_step(seed)
    before = copy.deepcopy(step)
    first = trained(step, estimator(step))
    _require_same(trained(step, estimator(step)), first, "a second call", tolerance=0.0)
    _require_same(trained(before, estimator(before)), first, "a call before", tolerance=0.0)


def check_nan_shows(estimator: AdvantageEstimator, seed: int) -> None:
    """A critic's value at a sampled token that is not finite is refused, or shows. (No part has such a reward.)"""
    step = steps.random_step(seed)
    expected = trained(step, estimator(step))
    for index in range(len(step.parts)):
        moved = trained(step, estimator(steps.with_value(step, index, 7.0)))
        if all(np.array_equal(ours, theirs) for ours, theirs in zip(moved, expected, strict=True)):
            continue
        bad = steps.with_value(step, index)
        if not _refuses(estimator, bad):
            shows = any(not np.isfinite(values).all() for values in trained(bad, estimator(bad)))
            require(shows, "a critic's value of NaN at a sampled token leaves finite advantages")


def _refuses(estimator: AdvantageEstimator, step: RewardBatch) -> bool:
    try:
        estimator(step)
    except ValueError:
        return True
    return False


ADVANTAGE_CHECKS: dict[str, Check] = {
    "form": check_form,
    "deletion": check_deletion,
    "poison": check_poison,
    "padding": check_padding,
    "permutation": check_permutation,
    "names": check_names,
    "segments": check_segments,
    "edges": check_edges,
    "purity": check_purity,
    "nan_shows": check_nan_shows,
}


def process(postprocessor: RewardPostprocessor, step: RewardBatch) -> list[float]:
    """The new rewards."""
    rewards = postprocessor([part.reward for part in step.parts], step.parts)
    require(len(rewards) == len(step.parts), f"{len(rewards)} rewards for {len(step.parts)} parts")
    return [float(reward) for reward in rewards]


def _require_same_rewards(found: Sequence[float], expected: Sequence[float], what: str) -> None:
    same = all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(found, expected, strict=True))
    require(same, f"{what} changes the rewards from {list(expected)} to {list(found)}")


def check_processed_form(postprocessor: RewardPostprocessor, seed: int) -> None:
    """One finite reward for each part; none of none."""
    rewards = process(postprocessor, steps.random_step(seed))
    require(all(math.isfinite(reward) for reward in rewards), f"a reward is not finite: {rewards}")
    require(not process(postprocessor, RewardBatch(parts=())), "a step without parts has rewards")


def check_processed_masked_slots(postprocessor: RewardPostprocessor, seed: int) -> None:
    """What was not sampled changes nothing: deleted, padded, or with nonsense in it."""
    step = steps.random_step(seed)
    expected = process(postprocessor, step)
    _require_same_rewards(
        process(postprocessor, steps.without_masked(step)), expected, "deleting what was not sampled"
    )
    _require_same_rewards(process(postprocessor, steps.padded(step, 5)), expected, "padding")
    _require_same_rewards(
        process(postprocessor, steps.poisoned(step, math.nan)), expected, "NaN where nothing was sampled"
    )


def check_processed_order(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The order of the parts changes nothing."""
    step = steps.random_step(seed)
    order = np.random.default_rng(seed).permutation(len(step.parts)).tolist()
    expected = process(postprocessor, step)
    shuffled = RewardBatch(parts=tuple(step.parts[index] for index in order))
    _require_same_rewards(
        process(postprocessor, shuffled), [expected[index] for index in order], "the order of the parts"
    )


def check_processed_segments(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The same tokens in more contexts change nothing."""
    step = steps.random_step(seed)
    _require_same_rewards(
        process(postprocessor, steps.split_by_turn(step)),
        process(postprocessor, step),
        "another cut into contexts",
    )


def check_processed_purity(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The rewards that came in are not changed, and the same ones give the same result."""
    step = steps.random_step(seed)
    rewards = [part.reward for part in step.parts]
    given = copy.copy(rewards)
    first = list(postprocessor(given, step.parts))
    require(given == rewards, "the rewards that came in are changed")
    _require_same_rewards(list(postprocessor(given, step.parts)), first, "a second call")


def check_chain(postprocessor: RewardPostprocessor, seed: int) -> None:
    """The rewards so far count, not those that the parts were played for: one step may follow another."""
    step = steps.random_step(seed)
    moved = [part.reward + 0.25 for part in step.parts]
    first = list(postprocessor([part.reward for part in step.parts], step.parts))
    require(
        list(postprocessor(moved, step.parts)) != first,
        "the rewards that an earlier step made are passed over",
    )


def check_processed_nan_shows(postprocessor: RewardPostprocessor, seed: int) -> None:
    """A reward of NaN is refused with a ValueError, or stays NaN."""
    step = steps.random_step(seed)
    for index in range(len(step.parts)):
        rewards = [math.nan if i == index else part.reward for i, part in enumerate(step.parts)]
        try:
            found = postprocessor(rewards, step.parts)
        except ValueError:
            continue
        require(math.isnan(found[index]), f"a reward of NaN becomes {found[index]}")


POSTPROCESSOR_CHECKS: dict[str, Check] = {
    "form": check_processed_form,
    "masked_slots": check_processed_masked_slots,
    "permutation": check_processed_order,
    "segments": check_processed_segments,
    "purity": check_processed_purity,
    "chain": check_chain,
    "nan_shows": check_processed_nan_shows,
}
