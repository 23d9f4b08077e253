"""The battery on batches that Hypothesis makes up: any number of samples, of any lengths and masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
)
from polyturn.trainer.battery import Case, cases, rewards, steps, token_weights
from polyturn.trainer.battery.rows import Row, count, padded, poisoned, random_rows, without_masked
from polyturn.trainer.battery.token_losses import evaluate

few = settings(max_examples=15, deadline=None, derandomize=True)


def every(registry: Any) -> pytest.MarkDecorator:
    """Each registered function at its defaults."""
    found = [case for case in cases(registry) if case.name == case.entry.name]
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Row, ...]:
    """One to six samples with any mask, some of one sequence, some of one prompt."""
    masks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
    rows = random_rows(draw(st.integers(0, 10**6)), lengths=[len(mask) for mask in masks])
    sequences = [draw(st.integers(0, index)) for index in range(len(rows))]
    return tuple(
        replace(row, mask=torch.tensor(mask), sequence=f"sequence-{number}", prompt=f"prompt-{number // 2}")
        for row, mask, number in zip(rows, masks, sequences, strict=True)
    )


@st.composite
def changes(draw: st.DrawFn) -> Any:
    """Something that changes nothing that matters about a row."""
    poison = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e9]))
    return draw(
        st.sampled_from(
            [without_masked, lambda row: padded(row, 2), lambda row: poisoned(padded(row, 1), poison)]
        )
    )


@pytest.mark.catalogue("B15", "B17")
@every(POLICY_LOSSES)
@few
@given(rows=batches(), change=changes())
def test_losses_see_trainable_tokens_only(case: Case, rows: tuple[Row, ...], change: Any) -> None:
    changed = [change(row) for row in rows]
    expected = evaluate(case.function, rows).at(rows)
    found = evaluate(case.function, changed, count(rows)).at(changed)
    for name, column in expected.items():
        torch.testing.assert_close(found[name], column, rtol=1e-9, atol=1e-9)


@pytest.mark.catalogue("B14", "B16", "B17")
@every(REDUCERS)
@few
@given(rows=batches(), change=changes(), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_weights_are_the_same_in_any_micro_batch(
    case: Case, rows: tuple[Row, ...], change: Any, cuts: list[int]
) -> None:
    counts = count(rows)
    changed = [change(row) for row in rows]
    expected = token_weights.weigh(case.function, rows, counts)
    bounds = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    found = [
        w
        for low, high in pairwise(bounds)
        for w in token_weights.weigh(case.function, changed[low:high], counts)
    ]
    for row, ours, other, theirs in zip(changed, found, rows, expected, strict=True):
        torch.testing.assert_close(ours[row.mask], theirs[other.mask], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "prompt_mean"])
@few
@given(rows=batches())
def test_a_mean_of_ones_is_one(kind: str, rows: tuple[Row, ...]) -> None:
    assume(any(row.num_trainable for row in rows))
    (case,) = (case for case in cases(REDUCERS) if case.name == kind)
    total = sum(weights.sum() for weights in token_weights.weigh(case.function, rows, count(rows)))
    assert float(total) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.catalogue("B34")
@every(CORRECTIONS)
@few
@given(rows=batches(), change=changes())
def test_corrections_see_trainable_tokens_only(case: Case, rows: tuple[Row, ...], change: Any) -> None:
    changed = [change(row) for row in rows]
    expected, metrics = token_weights.correct(case.function, rows)
    found, changed_metrics = token_weights.correct(case.function, changed)
    assert changed_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    for row, ours, other, theirs in zip(changed, found, rows, expected, strict=True):
        assert (theirs[other.mask] >= 0).all()
        torch.testing.assert_close(ours[row.mask], theirs[other.mask], rtol=1e-6, atol=1e-9)


sizes = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 5), min_size=1)


@pytest.mark.catalogue("B1", "B2", "B7")
@every(ADVANTAGES)
@few
@given(seed=st.integers(0, 10**6), sizes=sizes, data=st.data())
def test_advantages_see_sampled_tokens_only(case: Case, seed: int, sizes: dict[str, int], data: Any) -> None:
    step = steps.random_step(seed, sizes=sizes)
    order = data.draw(st.permutations(range(len(step.parts))))
    changed = steps.poisoned(steps.padded(step, 2), data.draw(st.sampled_from([float("nan"), 1e9])))
    changed = replace(changed, parts=tuple(changed.parts[index] for index in order))
    expected, found = case.function(step), case.function(changed)
    theirs = rewards.trained(step, expected)
    for place, values in enumerate(rewards.trained(changed, found)):
        assert values == pytest.approx(theirs[order[place]], rel=1e-4, abs=1e-4)
        assert found.trainable[place] == expected.trainable[order[place]]


@every(REWARD_POSTPROCESSORS)
@few
@given(seed=st.integers(0, 10**6), sizes=sizes, data=st.data())
def test_postprocessing_sees_sampled_tokens_only(
    case: Case, seed: int, sizes: dict[str, int], data: Any
) -> None:
    step = steps.random_step(seed, sizes=sizes)
    order = data.draw(st.permutations(range(len(step.parts))))
    changed = steps.padded(step, data.draw(st.integers(0, 3)))
    changed = replace(changed, parts=tuple(changed.parts[index] for index in order))
    expected = rewards.process(case.function, step)
    assert rewards.process(case.function, changed) == pytest.approx([expected[index] for index in order])
