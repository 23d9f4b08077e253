"""What must hold of everything that is minimised token by token: every policy loss, and every KL estimator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from polyturn.trainer.algorithms.protocols import KLEstimator, PolicyLoss
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.battery.invariances import Check, Invariances, Outcome, require, require_equal
from polyturn.trainer.battery.rows import FLOATS, LEAVES, Row, count, random_rows, split_by_row, to_batch

TOLERANCE = 1e-9
"""Of sums in another order, in float64."""


def evaluate(loss: PolicyLoss, rows: Sequence[Row], counts: GlobalCounts | None = None) -> Outcome:
    """The loss of rows: `value`, `clipped`, and the gradients by LEAVES of the sum of cotangent times value."""
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
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        gradients[f"gradient by {name}"] = split_by_row(rows, gradient)
    return Outcome(
        columns={
            "value": split_by_row(rows, result.values.detach()),
            "clipped": split_by_row(rows, result.clipped),
            **gradients,
        }
    )


def check_masked_slots(loss: PolicyLoss, seed: int) -> None:
    """Masked tokens have no value and no gradient; trainable ones have finite ones."""
    rows = random_rows(seed)
    result = evaluate(loss, rows)
    result.require_silence(rows, "with finite columns")
    for name, column in result.at(rows).items():
        require(
            bool(column.isfinite().all()),
            f"the {name} of a trainable token with finite columns is not finite",
        )


def check_empty(loss: PolicyLoss, seed: int) -> None:
    """A micro-batch without tokens, or without trainable ones, has a loss of 0."""
    rows = random_rows(seed)
    evaluate(loss, (), count(rows))
    silent = [replace(row, mask=torch.zeros_like(row.mask)) for row in rows]
    evaluate(loss, silent).require_silence(silent, "in a batch without a trainable token")


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
        all(value.dtype == torch.float32 for value in found.columns["value"]),
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


LOSS_CHECKS: dict[str, Check] = {
    "masked_slots": check_masked_slots,
    **Invariances(evaluate=evaluate, tolerance=TOLERANCE).checks(split=True),
    "empty": check_empty,
    "overflow": check_overflow,
    "purity": check_purity,
    "dtype": check_dtype,
    "nan_shows": check_nan_shows,
}


def _columns(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = random_rows(seed)
    ours, other = (
        torch.cat([row.columns[name] for row in rows]) for name in ("logprobs", "reference_logprobs")
    )
    return ours, other, torch.cat([row.mask for row in rows])


def _estimate(
    estimator: KLEstimator, logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logprobs.clone().requires_grad_()
    values = estimator(leaf, other, mask)
    require(values.shape == mask.shape, f"values of shape {tuple(values.shape)} for {len(mask)} tokens")
    values.sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def check_masked_slots_of_kl(estimator: KLEstimator, seed: int) -> None:
    """Masked tokens have no value and no gradient, whatever stands there; deleting them changes nothing."""
    logprobs, other, mask = _columns(seed)
    expected = _estimate(estimator, logprobs[mask], other[mask], mask[mask])
    for poison in (0.0, math.nan, math.inf, 1e9):
        found = _estimate(
            estimator, torch.where(mask, logprobs, poison), torch.where(mask, other, poison), mask
        )
        for what, ours, theirs in zip(("value", "gradient"), found, expected, strict=True):
            require_equal(ours[mask], theirs, f"{poison} in masked slots changes a {what}")
            require(not bool(ours[~mask].any()), f"with {poison} in it a masked slot has a {what}")


def check_zero(estimator: KLEstimator, seed: int) -> None:
    """A policy is at distance 0 from itself."""
    logprobs, _, mask = _columns(seed)
    values, _ = _estimate(estimator, logprobs, logprobs, mask)
    require_equal(values, torch.zeros_like(values), "a policy's KL to itself is not 0", tolerance=1e-12)


def check_pull(estimator: KLEstimator, _seed: int) -> None:
    """The further a token drifted, the harder it is pulled back, up to log-ratios of 10: nothing is clamped away."""
    drift = torch.linspace(0, 10, 41, dtype=torch.float64)
    mask = torch.ones_like(drift, dtype=torch.bool)
    for sign in (-1, 1):
        _, pull = _estimate(estimator, sign * drift, torch.zeros_like(drift), mask)
        grows = bool((pull.abs().diff() >= -1e-12).all()) and bool(pull[-1] != 0)
        require(
            grows, f"the gradient fades as log policy - log other goes to {sign * 10}: {pull[::8].tolist()}"
        )


def check_overflow_of_kl(estimator: KLEstimator, _seed: int) -> None:
    """Log-ratios of 400 give finite values and gradients, in float32."""
    drift = torch.tensor([-400.0, 400.0])
    for what in _estimate(estimator, drift, torch.zeros(2), torch.ones(2, dtype=torch.bool)):
        require(
            bool(what.isfinite().all()),
            f"a value or gradient is not finite at {drift.tolist()}: {what.tolist()}",
        )


def check_nan_shows_of_kl(estimator: KLEstimator, seed: int) -> None:
    """A NaN on a trainable token is not hidden."""
    logprobs, other, mask = _columns(seed)
    token = int(mask.nonzero()[0])
    for place in (0, 1):
        columns = [logprobs.clone(), other.clone()]
        columns[place][token] = math.nan
        require(
            bool(estimator(columns[0], columns[1], mask)[token].isnan()),
            "a NaN on a trainable token gives a finite estimate",
        )


KL_CHECKS: dict[str, Check] = {
    "masked_slots": check_masked_slots_of_kl,
    "zero": check_zero,
    "pull": check_pull,
    "overflow": check_overflow_of_kl,
    "nan_shows": check_nan_shows_of_kl,
}
