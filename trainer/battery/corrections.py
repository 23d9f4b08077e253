"""What must hold of every off-policy correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from polyturn.trainer.algorithms.protocols import Correction
from polyturn.trainer.battery.rows import (
    BatteryFailure,
    Row,
    padded,
    poisoned,
    random_rows,
    require,
    require_equal,
    split_by_row,
    without_masked,
)

TOLERANCE = 1e-6
COLUMNS = ("behavior_logprobs", "proximal_logprobs", "advantages")


def correct(correction: Correction, rows: Sequence[Row]) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The weights by row, [T] each, and the metrics."""
    behavior, proximal, advantages = (torch.cat([row.columns[name] for row in rows]) for name in COLUMNS)
    mask = torch.cat([row.mask for row in rows])
    index = torch.cat([torch.full((len(row),), number) for number, row in enumerate(rows)])
    before = [column.clone() for column in (behavior, proximal, advantages)]
    result = correction(behavior, proximal, mask, index, advantages)
    for column, old in zip((behavior, proximal, advantages), before, strict=True):
        require(torch.equal(column.nan_to_num(), old.nan_to_num()), "the correction changes its arguments")
    require(
        result.weights.shape == mask.shape,
        f"weights of shape {tuple(result.weights.shape)} for {len(mask)} tokens",
    )
    require(not result.weights.requires_grad, "the weights carry a gradient")
    require(bool((result.weights[~mask] == 0).all()), "a masked token has a weight")
    return split_by_row(rows, result.weights.double()), dict(result.metrics)


def _at(rows: Sequence[Row], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([weight[row.mask] for weight, row in zip(weights, rows, strict=True)])


def _require_same(
    correction: Correction,
    changed: Sequence[Row],
    rows: Sequence[Row],
    what: str,
    tolerance: float = TOLERANCE,
) -> None:
    weights, metrics = correct(correction, rows)
    found, found_metrics = correct(correction, changed)
    require_equal(_at(changed, found), _at(rows, weights), f"{what} changes a weight", tolerance=tolerance)
    for name, value in metrics.items():
        other = found_metrics.get(name, math.nan)
        require(
            math.isclose(other, value, rel_tol=1e-5, abs_tol=1e-7),
            f"{what} changes the metric {name} from {value} to {other}",
        )


def check_form(correction: Correction, seed: int) -> None:
    """One finite weight a token, not negative, 0 where the mask is; finite metrics."""
    rows = random_rows(seed)
    weights, metrics = correct(correction, rows)
    found = _at(rows, weights)
    require(bool((found >= 0).all()) and bool(found.isfinite().all()), "a weight is negative or not finite")
    for name, value in metrics.items():
        require(math.isfinite(value), f"the metric {name} is {value}")


def check_identity(correction: Correction, seed: int) -> None:
    """Where sampler and trainer agree there is nothing to correct: all weights are 1."""
    rows = [row.having(proximal_logprobs=row.columns["behavior_logprobs"]) for row in random_rows(seed)]
    found = _at(rows, correct(correction, rows)[0])
    require_equal(
        found,
        torch.ones_like(found),
        "sampler and trainer agree, but a weight is not 1",
        tolerance=TOLERANCE,
    )


def check_deletion(correction: Correction, seed: int) -> None:
    """Deleting masked tokens changes no weight and no metric."""
    rows = random_rows(seed)
    _require_same(correction, [without_masked(row) for row in rows], rows, "deleting masked tokens")


def check_poison(correction: Correction, seed: int) -> None:
    """Whatever stands in masked slots changes no weight and no metric."""
    rows = random_rows(seed)
    for poison in (math.nan, math.inf, 1e9):
        bad = [poisoned(row, poison) for row in rows]
        _require_same(correction, bad, rows, f"{poison} in masked slots", tolerance=0.0)


def check_padding(correction: Correction, seed: int) -> None:
    """Masked tokens after a row change nothing."""
    rows = random_rows(seed)
    _require_same(correction, [padded(row, 3) for row in rows], rows, "padding")


def check_permutation(correction: Correction, seed: int) -> None:
    """The order of the sequences changes nothing."""
    rows = random_rows(seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    weights, shuffled = correct(correction, rows)[0], [rows[index] for index in order]
    found = _at(shuffled, correct(correction, shuffled)[0])
    expected = _at(shuffled, [weights[index] for index in order])
    require_equal(found, expected, "the order of the sequences changes a weight", tolerance=TOLERANCE)


def check_overflow(correction: Correction, seed: int) -> None:
    """A sampler that is far away gives finite weights, in float32, too."""
    for dtype in (torch.float32, torch.float64):
        for gap in (-400.0, 400.0):
            rows = random_rows(seed, dtype=dtype)
            far = [row.having(behavior_logprobs=row.columns["proximal_logprobs"] + gap) for row in rows]
            found = _at(far, correct(correction, far)[0])
            require(
                bool(found.isfinite().all()),
                f"a weight is not finite where the sampler's logprobs are {gap:+.0f} away, in {dtype}",
            )


def check_empty(correction: Correction, seed: int) -> None:
    """A step without a trainable token has weights of 0 and finite metrics."""
    silent = [replace(row, mask=torch.zeros_like(row.mask)) for row in random_rows(seed)]
    for name, value in correct(correction, silent)[1].items():
        require(math.isfinite(value), f"the metric {name} is {value} where no token is trainable")


def check_nan_shows(correction: Correction, seed: int) -> None:
    """A NaN on a trainable token is refused with a ValueError, or the token's weight is NaN; never silently dropped."""
    rows = random_rows(seed)
    token = int(rows[0].mask.nonzero()[0])
    for name in COLUMNS[:2]:
        column = rows[0].columns[name].clone()
        column[token] = math.nan
        bad = [rows[0].having(**{name: column}), *rows[1:]]
        try:
            weights = correct(correction, bad)[0]
        except BatteryFailure:
            raise
        except ValueError:
            continue
        require(
            bool(weights[0][token].isnan()), f"a NaN in {name} of a trainable token gives it a finite weight"
        )


CHECKS = {
    "form": check_form,
    "identity": check_identity,
    "deletion": check_deletion,
    "poison": check_poison,
    "padding": check_padding,
    "permutation": check_permutation,
    "overflow": check_overflow,
    "empty": check_empty,
    "nan_shows": check_nan_shows,
}
