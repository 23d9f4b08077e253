"""What must hold of everything that gives a token a weight: every reduction, and every off-policy correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from polyturn.trainer.algorithms.protocols import Correction, EntropyControl, Reducer
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.battery.invariances import (
    BatteryFailure,
    Check,
    Invariances,
    Outcome,
    require,
    require_equal,
)
from polyturn.trainer.battery.rows import Row, count, random_rows, split_by_row, to_batch

TOLERANCE = 1e-6
"""Weights may be float32."""
COLUMNS = ("behavior_logprobs", "proximal_logprobs", "advantages")
"""What a correction is given."""


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


def _reduce(reducer: Reducer, rows: Sequence[Row], counts: GlobalCounts) -> Outcome:
    return Outcome(columns={"weight": weigh(reducer, rows, counts)})


def check_reducer_form(reducer: Reducer, seed: int) -> None:
    """One finite weight a token, not negative, 0 where the mask is; at least one is positive."""
    rows = random_rows(seed)
    weights = _reduce(reducer, rows, count(rows)).at(rows)["weight"]
    require(bool(weights.isfinite().all()) and bool(weights.any()), "the weights are not finite, or all 0")


def check_duplication(reducer: Reducer, seed: int) -> None:
    """An update that holds everything twice has the same loss as one that holds it once. Not so of sums."""
    rows = random_rows(seed)
    again = [replace(row, sequence=f"{row.sequence}-again", prompt=f"{row.prompt}-again") for row in rows]
    both = [*rows, *again]
    once = _reduce(reducer, rows, count(rows)).at(rows)["weight"]
    twice = _reduce(reducer, both, count(both)).at(both)["weight"]
    require_equal(twice, torch.cat([once, once]) / 2, "holding everything twice", tolerance=TOLERANCE)


def check_reducer_empty(reducer: Reducer, seed: int) -> None:
    """A rank's micro-batch without tokens has no weights, an update without trainable ones only zeros."""
    rows = random_rows(seed)
    weigh(reducer, (), count(rows))
    silent = [replace(row, mask=torch.zeros_like(row.mask)) for row in rows]
    weigh(reducer, silent, count(silent))


REDUCER_CHECKS: dict[str, Check] = {
    "form": check_reducer_form,
    **Invariances(evaluate=_reduce, tolerance=TOLERANCE).checks(split=True),
    "duplication": check_duplication,
    "empty": check_reducer_empty,
}


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


def _correct(correction: Correction, rows: Sequence[Row], _counts: GlobalCounts | None = None) -> Outcome:
    weights, metrics = correct(correction, rows)
    return Outcome(columns={"weight": weights}, metrics=metrics)


def check_form(correction: Correction, seed: int) -> None:
    """One finite weight a token, not negative, 0 where the mask is; finite metrics."""
    rows = random_rows(seed)
    outcome = _correct(correction, rows)
    found = outcome.at(rows)["weight"]
    require(bool((found >= 0).all()) and bool(found.isfinite().all()), "a weight is negative or not finite")
    for name, value in outcome.metrics.items():
        require(math.isfinite(value), f"the metric {name} is {value}")


def check_identity(correction: Correction, seed: int) -> None:
    """Where sampler and trainer agree there is nothing to correct: all weights are 1."""
    rows = [row.having(proximal_logprobs=row.columns["behavior_logprobs"]) for row in random_rows(seed)]
    found = _correct(correction, rows).at(rows)["weight"]
    require_equal(
        found,
        torch.ones_like(found),
        "sampler and trainer agree, but a weight is not 1",
        tolerance=TOLERANCE,
    )


def check_overflow(correction: Correction, seed: int) -> None:
    """A sampler that is far away gives finite weights, in float32, too."""
    for dtype in (torch.float32, torch.float64):
        for gap in (-400.0, 400.0):
            rows = random_rows(seed, dtype=dtype)
            far = [row.having(behavior_logprobs=row.columns["proximal_logprobs"] + gap) for row in rows]
            found = _correct(correction, far).at(far)["weight"]
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


CORRECTION_CHECKS: dict[str, Check] = {
    "form": check_form,
    "identity": check_identity,
    **Invariances(evaluate=_correct, tolerance=TOLERANCE).checks(split=False),
    "overflow": check_overflow,
    "empty": check_empty,
    "nan_shows": check_nan_shows,
}


def _control(control: EntropyControl, rows: Sequence[Row], _counts: GlobalCounts | None = None) -> Outcome:
    logprobs, advantages = (
        torch.cat([row.columns[name] for row in rows]) for name in ("proximal_logprobs", "advantages")
    )
    mask = torch.cat([row.mask for row in rows])
    before = [column.clone() for column in (logprobs, advantages)]
    result = control(logprobs, advantages, mask)
    for column, old in zip((logprobs, advantages), before, strict=True):
        require(torch.equal(column.nan_to_num(), old.nan_to_num()), "the control changes its arguments")
    columns = {"weight": result.weights, "penalty's weight": result.kl_weights}
    for name, column in columns.items():
        require(column.shape == mask.shape, f"a {name} of shape {tuple(column.shape)} for {len(mask)} tokens")
        require(not column.requires_grad, f"the {name} carries a gradient")
    return Outcome(
        columns={name: split_by_row(rows, column.double()) for name, column in columns.items()},
        metrics=dict(result.metrics),
    )


def check_control_form(control: EntropyControl, seed: int) -> None:
    """Two finite weights a token, not negative, 0 where the mask is; finite metrics, without trainable tokens, too."""
    rows = random_rows(seed)
    outcome = _control(control, rows)
    for name, found in outcome.at(rows).items():
        require(
            bool((found >= 0).all()) and bool(found.isfinite().all()), f"a {name} is negative or not finite"
        )
    outcome.require_silence(rows, "as they are,")
    silent = [replace(row, mask=torch.zeros_like(row.mask)) for row in rows]
    for name, value in {**outcome.metrics, **_control(control, silent).metrics}.items():
        require(math.isfinite(value), f"the metric {name} is {value}")


def check_control_nan_shows(control: EntropyControl, seed: int) -> None:
    """A NaN on a trainable token is refused with a ValueError, not taken for a number."""
    rows = random_rows(seed)
    token = int(rows[0].mask.nonzero()[0])
    for name in ("proximal_logprobs", "advantages"):
        column = rows[0].columns[name].clone()
        column[token] = math.nan
        try:
            _control(control, [rows[0].having(**{name: column}), *rows[1:]])
        except ValueError:
            continue
        raise BatteryFailure(f"a NaN in {name} of a trainable token is taken for a number")


CONTROL_CHECKS: dict[str, Check] = {
    "form": check_control_form,
    **Invariances(evaluate=_control, tolerance=TOLERANCE).checks(split=False),
    "nan_shows": check_control_nan_shows,
}
