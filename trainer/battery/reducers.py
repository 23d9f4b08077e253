"""What must hold of every reduction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from polyturn.trainer.algorithms.protocols import Reducer
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.battery.rows import (
    Row,
    count,
    padded,
    poisoned,
    random_rows,
    require,
    require_equal,
    split_by_row,
    to_batch,
    without_masked,
)

TOLERANCE = 1e-6
"""Weights may be float32."""


def weigh(reducer: Reducer, rows: Sequence[Row], counts: GlobalCounts) -> list[torch.Tensor]:
    """The weights by row, [T] each."""
    batch = to_batch(rows, counts)
    weights = reducer(batch.mask, batch, counts)
    require(
        weights.shape == batch.mask.shape,
        f"weights of shape {tuple(weights.shape)} for {len(batch.mask)} tokens",
    )
    require(not weights.requires_grad, "the weights carry a gradient")
    require(bool((weights[batch.mask] >= 0).all()), "a weight is negative or NaN")
    require(bool((weights[~batch.mask] == 0).all()), "a masked token has a weight")
    return split_by_row(rows, weights.double())


def _at(rows: Sequence[Row], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight[row.mask] for weight, row in zip(weights, rows, strict=True)])


def check_form(reducer: Reducer, seed: int) -> None:
    """One finite weight a token, not negative, 0 where the mask is; at least one is positive."""
    rows = random_rows(seed)
    weights = _at(rows, weigh(reducer, rows, count(rows)))
    require(bool(weights.isfinite().all()) and bool(weights.any()), "the weights are not finite, or all 0")


def check_deletion(reducer: Reducer, seed: int) -> None:
    """Deleting masked tokens changes nothing."""
    rows = random_rows(seed)
    short, counts = [without_masked(row) for row in rows], count(rows)
    expected = _at(rows, weigh(reducer, rows, counts))
    require_equal(
        _at(short, weigh(reducer, short, counts)), expected, "deleting masked tokens", tolerance=TOLERANCE
    )


def check_poison(reducer: Reducer, seed: int) -> None:
    """Whatever stands in masked slots changes nothing."""
    rows = random_rows(seed)
    counts = count(rows)
    expected = _at(rows, weigh(reducer, rows, counts))
    for poison in (math.nan, math.inf, 1e9):
        bad = [poisoned(row, poison) for row in rows]
        require_equal(_at(bad, weigh(reducer, bad, counts)), expected, f"{poison} in masked slots")


def check_padding(reducer: Reducer, seed: int) -> None:
    """Masked tokens after a row change nothing."""
    rows = random_rows(seed)
    wide, counts = [padded(row, 4) for row in rows], count(rows)
    expected = _at(rows, weigh(reducer, rows, counts))
    require_equal(_at(wide, weigh(reducer, wide, counts)), expected, "padding", tolerance=TOLERANCE)


def check_permutation(reducer: Reducer, seed: int) -> None:
    """The order of the samples changes nothing."""
    rows = random_rows(seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled, weights = [rows[index] for index in order], weigh(reducer, rows, count(rows))
    found = _at(shuffled, weigh(reducer, shuffled, count(rows)))
    expected = _at(shuffled, [weights[index] for index in order])
    require_equal(found, expected, "the order of the samples", tolerance=TOLERANCE)


def check_split(reducer: Reducer, seed: int) -> None:
    """A token has the same weight in any micro-batch: denominators are those of the whole update."""
    rows = random_rows(seed)
    counts = count(rows)
    expected = _at(rows, weigh(reducer, rows, counts))
    every = tuple(range(len(rows) + 1))
    for bounds in (every, (0, 1, len(rows)), (0, len(rows) // 2, len(rows))):
        found = [w for low, high in pairwise(bounds) for w in weigh(reducer, rows[low:high], counts)]
        require_equal(
            _at(rows, found),
            expected,
            f"splitting into {len(bounds) - 1} micro-batches",
            tolerance=TOLERANCE,
        )


def check_duplication(reducer: Reducer, seed: int) -> None:
    """An update that holds everything twice has the same loss as one that holds it once. Not so of sums."""
    rows = random_rows(seed)
    again = [replace(row, sequence=f"{row.sequence}-again", prompt=f"{row.prompt}-again") for row in rows]
    both = [*rows, *again]
    once = _at(rows, weigh(reducer, rows, count(rows)))
    twice = _at(both, weigh(reducer, both, count(both)))
    require_equal(twice, torch.cat([once, once]) / 2, "holding everything twice", tolerance=TOLERANCE)


def check_empty(reducer: Reducer, seed: int) -> None:
    """A rank's micro-batch without tokens has no weights, an update without trainable ones only zeros."""
    rows = random_rows(seed)
    weigh(reducer, (), count(rows))
    silent = [replace(row, mask=torch.zeros_like(row.mask)) for row in rows]
    weigh(reducer, silent, count(silent))


CHECKS = {
    "form": check_form,
    "deletion": check_deletion,
    "poison": check_poison,
    "padding": check_padding,
    "permutation": check_permutation,
    "split": check_split,
    "duplication": check_duplication,
    "empty": check_empty,
}
