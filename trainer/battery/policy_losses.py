"""What must hold of every policy loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from polyturn.trainer.algorithms.protocols import PolicyLoss
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.battery.rows import (
    FLOATS,
    LEAVES,
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

TOLERANCE = 1e-9
"""Of sums in another order, in float64."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """What a loss makes of rows, by row: [T] each."""

    values: list[torch.Tensor]
    clipped: list[torch.Tensor]
    gradients: dict[str, list[torch.Tensor]]
    """By column of LEAVES: the gradient of the sum of cotangent times value."""

    def at(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Everything at the trainable tokens."""
        columns = {"value": self.values, "clipped": self.clipped}
        columns |= {f"gradient by {name}": gradient for name, gradient in self.gradients.items()}
        return {
            name: torch.cat([part[row.mask].double() for part, row in zip(parts, rows, strict=True)])
            for name, parts in columns.items()
        }


def evaluate(loss: PolicyLoss, rows: Sequence[Row], counts: GlobalCounts | None = None) -> Outcome:
    """The loss of rows, with gradients."""
    batch = to_batch(rows, counts or count(rows))
    result = loss(batch)
    mask = batch.mask
    require(
        result.values.shape == mask.shape,
        f"values of shape {tuple(result.values.shape)} for {len(mask)} tokens",
    )
    require(
        result.clipped.shape == mask.shape and result.clipped.dtype == torch.bool,
        f"clipped is {result.clipped.dtype} of shape {tuple(result.clipped.shape)}; bool, one a token, is asked for",
    )
    cotangents = torch.cat([row.columns["cotangents"] for row in rows]) if rows else batch.logprobs.detach()
    total = (result.values * cotangents).sum()
    if total.requires_grad:
        total.backward()
    gradients = {}
    for name in LEAVES:
        leaf = getattr(batch, name)
        gradients[name] = split_by_row(rows, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    return Outcome(
        values=split_by_row(rows, result.values.detach()),
        clipped=split_by_row(rows, result.clipped),
        gradients=gradients,
    )


def _require_same(
    found: Outcome,
    found_rows: Sequence[Row],
    expected: Outcome,
    expected_rows: Sequence[Row],
    what: str,
    *,
    tolerance: float = TOLERANCE,
) -> None:
    theirs = expected.at(expected_rows)
    for name, ours in found.at(found_rows).items():
        require_equal(ours, theirs[name], f"{what} changes the {name}", tolerance=tolerance)


def check_masked_slots(loss: PolicyLoss, seed: int) -> None:
    """Masked tokens have no value and no gradient; trainable ones have finite ones."""
    rows = random_rows(seed)
    result = evaluate(loss, rows)
    masked = [replace(row, mask=~row.mask) for row in rows]
    for name, column in result.at(masked).items():
        require_equal(column, torch.zeros_like(column), f"the {name} of a masked token is not 0")
    for name, column in result.at(rows).items():
        require(
            bool(column.isfinite().all()),
            f"the {name} of a trainable token with finite columns is not finite",
        )


def check_deletion(loss: PolicyLoss, seed: int) -> None:
    """Deleting masked tokens changes nothing."""
    rows = random_rows(seed)
    short = [without_masked(row) for row in rows]
    _require_same(
        evaluate(loss, short, count(rows)), short, evaluate(loss, rows), rows, "deleting masked tokens"
    )


def check_poison(loss: PolicyLoss, seed: int) -> None:
    """Whatever stands in masked slots changes nothing, to the last bit."""
    rows = random_rows(seed)
    expected = evaluate(loss, rows)
    masked = [replace(row, mask=~row.mask) for row in rows]
    for poison in (math.nan, math.inf, -math.inf, 1e9, -1e9):
        bad = [poisoned(row, poison) for row in rows]
        found = evaluate(loss, bad)
        what = f"{poison} in masked slots"
        _require_same(found, bad, expected, rows, what, tolerance=0.0)
        for name, column in found.at(masked).items():
            require_equal(column, torch.zeros_like(column), f"with {what} the {name} there is not 0")


def check_padding(loss: PolicyLoss, seed: int) -> None:
    """Masked tokens after a row change nothing."""
    rows = random_rows(seed)
    wide = [padded(row, 1 + index % 3) for index, row in enumerate(rows)]
    _require_same(evaluate(loss, wide), wide, evaluate(loss, rows), rows, "padding")


def check_permutation(loss: PolicyLoss, seed: int) -> None:
    """The order of the samples in a pack changes nothing."""
    rows = random_rows(seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    expected = evaluate(loss, rows)
    shuffled = [rows[index] for index in order]
    moved = Outcome(
        values=[expected.values[index] for index in order],
        clipped=[expected.clipped[index] for index in order],
        gradients={name: [parts[index] for index in order] for name, parts in expected.gradients.items()},
    )
    _require_same(evaluate(loss, shuffled), shuffled, moved, shuffled, "the order of the samples")


def check_split(loss: PolicyLoss, seed: int) -> None:
    """A sample has the same loss alone, and in any micro-batch: parts add up to the whole however it is packed."""
    rows = random_rows(seed)
    counts, expected = count(rows), evaluate(loss, rows)
    every = tuple(range(len(rows) + 1))
    for bounds in (every, (0, 1, len(rows)), (0, len(rows) // 2, len(rows))):
        parts = [evaluate(loss, rows[low:high], counts) for low, high in pairwise(bounds)]
        joined = Outcome(
            values=[value for part in parts for value in part.values],
            clipped=[value for part in parts for value in part.clipped],
            gradients={name: [value for part in parts for value in part.gradients[name]] for name in LEAVES},
        )
        _require_same(joined, rows, expected, rows, f"splitting into {len(bounds) - 1} micro-batches")


def check_empty(loss: PolicyLoss, seed: int) -> None:
    """A micro-batch without tokens, or without trainable ones, has a loss of 0."""
    rows = random_rows(seed)
    evaluate(loss, (), count(rows))
    silent = [replace(row, mask=torch.zeros_like(row.mask)) for row in rows]
    result = evaluate(loss, silent)
    for column in (*result.values, *(part for parts in result.gradients.values() for part in parts)):
        require_equal(column, torch.zeros_like(column), "a batch without a trainable token has a loss")


def check_overflow(loss: PolicyLoss, seed: int) -> None:
    """Anchors that are far away on either side give a finite loss and gradient, in float32, too."""
    for dtype in (torch.float32, torch.float64):
        rows = random_rows(seed, dtype=dtype)
        for name in ("behavior_logprobs", "proximal_logprobs"):
            for gap in (-400.0, 400.0):
                far = [row.having(**{name: row.columns["logprobs"] + gap}) for row in rows]
                for what, column in evaluate(loss, far).at(far).items():
                    require(
                        bool(column.isfinite().all()),
                        f"the {what} is not finite where {name} are {gap:+.0f} from the policy's, in {dtype}",
                    )


def check_purity(loss: PolicyLoss, seed: int) -> None:
    """The batch is not changed, the same batch has the same loss, and no gradient goes into an anchor or a weight."""
    rows = random_rows(seed)
    batch = to_batch(rows, count(rows))
    fixed = {name: getattr(batch, name).clone() for name in FLOATS if name not in LEAVES}
    for name in fixed.keys() - {"advantages"}:
        fixed[name].requires_grad_()
    before = {name: column.detach().clone() for name, column in fixed.items()}
    batch = replace(batch, **fixed)
    results = [loss(batch) for _ in range(2)]
    require_equal(results[0].values, results[1].values, "the same batch has another loss the second time")
    if results[0].values.requires_grad:
        results[0].values.sum().backward()
    for name, column in fixed.items():
        require_equal(column.detach(), before[name], f"the loss changes {name}")
        require(
            column.grad is None or not bool(column.grad.any()),
            f"a gradient goes into {name}, which are constants",
        )


def check_dtype(loss: PolicyLoss, seed: int) -> None:
    """In float32 the loss is float32, and nearly that of float64."""
    rows, single = random_rows(seed), random_rows(seed, dtype=torch.float32)
    found = evaluate(loss, single)
    require(
        all(value.dtype == torch.float32 for value in found.values),
        "a loss of float32 columns is not float32",
    )
    theirs = evaluate(loss, rows).at(rows)
    require_equal(found.at(single)["value"], theirs["value"], "float32 changes the value", tolerance=1e-4)


def check_nan_shows(loss: PolicyLoss, seed: int) -> None:
    """A NaN on a trainable token, in a column that this token's loss depends on, is not hidden."""
    rows = random_rows(seed, lengths=(3, 4))
    counts = count(rows)
    expected = evaluate(loss, rows, counts).at(rows)

    def with_change(name: str, place: tuple[int, int], change: float) -> tuple[Row, ...]:
        changed = rows[place[0]].columns[name].clone()
        changed[place[1]] += change
        return tuple(row.having(**{name: changed}) if i == place[0] else row for i, row in enumerate(rows))

    places = [(i, int(t)) for i, row in enumerate(rows) for t in row.mask.nonzero()]
    for name in FLOATS:
        for place in places:
            moved = [
                evaluate(loss, with_change(name, place, step), counts).at(rows) for step in (0.1, -3.0, 3.0)
            ]
            if all(torch.equal(other[key], expected[key]) for other in moved for key in expected):
                continue
            found = evaluate(loss, with_change(name, place, math.nan), counts).at(rows)
            require(
                any(not bool(column.isfinite().all()) for column in found.values()),
                f"a NaN in {name} of a trainable token leaves a finite loss and gradient",
            )


CHECKS = {
    "masked_slots": check_masked_slots,
    "deletion": check_deletion,
    "poison": check_poison,
    "padding": check_padding,
    "permutation": check_permutation,
    "split": check_split,
    "empty": check_empty,
    "overflow": check_overflow,
    "purity": check_purity,
    "dtype": check_dtype,
    "nan_shows": check_nan_shows,
}
