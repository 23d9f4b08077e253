"""What must hold of every KL estimator."""

from __future__ import annotations

import math

import torch

from polyturn.trainer.algorithms.protocols import KLEstimator
from polyturn.trainer.battery.rows import random_rows, require, require_equal


def _columns(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = random_rows(seed)
    ours, other = (
        torch.cat([row.columns[name] for row in rows]) for name in ("logprobs", "reference_logprobs")
    )
    return ours, other, torch.cat([row.mask for row in rows])


def _evaluate(
    estimator: KLEstimator, logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logprobs.clone().requires_grad_()
    values = estimator(leaf, other, mask)
    require(values.shape == mask.shape, f"values of shape {tuple(values.shape)} for {len(mask)} tokens")
    values.sum().backward()
    assert leaf.grad is not None
    return values.detach(), leaf.grad


def check_masked_slots(estimator: KLEstimator, seed: int) -> None:
    """Masked tokens have no value and no gradient, whatever stands there; deleting them changes nothing."""
    logprobs, other, mask = _columns(seed)
    expected = _evaluate(estimator, logprobs[mask], other[mask], mask[mask])
    for poison in (0.0, math.nan, math.inf, 1e9):
        found = _evaluate(
            estimator, torch.where(mask, logprobs, poison), torch.where(mask, other, poison), mask
        )
        for what, ours, theirs in zip(("value", "gradient"), found, expected, strict=True):
            require_equal(ours[mask], theirs, f"{poison} in masked slots changes a {what}")
            require(not bool(ours[~mask].any()), f"with {poison} in it a masked slot has a {what}")


def check_zero(estimator: KLEstimator, seed: int) -> None:
    """A policy is at distance 0 from itself."""
    logprobs, _, mask = _columns(seed)
    values, _ = _evaluate(estimator, logprobs, logprobs, mask)
    require_equal(values, torch.zeros_like(values), "a policy's KL to itself is not 0", tolerance=1e-12)


def check_pull(estimator: KLEstimator, _seed: int) -> None:
    """The further a token drifted, the harder it is pulled back, up to log-ratios of 10: nothing is clamped away."""
    drift = torch.linspace(0, 10, 41, dtype=torch.float64)
    mask = torch.ones_like(drift, dtype=torch.bool)
    for sign in (-1, 1):
        _, pull = _evaluate(estimator, sign * drift, torch.zeros_like(drift), mask)
        grows = bool((pull.abs().diff() >= -1e-12).all()) and bool(pull[-1] != 0)
        require(
            grows, f"the gradient fades as log policy - log other goes to {sign * 10}: {pull[::8].tolist()}"
        )


def check_overflow(estimator: KLEstimator, _seed: int) -> None:
    """Log-ratios of 400 give finite values and gradients, in float32."""
    drift = torch.tensor([-400.0, 400.0])
    for what in _evaluate(estimator, drift, torch.zeros(2), torch.ones(2, dtype=torch.bool)):
        require(
            bool(what.isfinite().all()),
            f"a value or gradient is not finite at {drift.tolist()}: {what.tolist()}",
        )


def check_nan_shows(estimator: KLEstimator, seed: int) -> None:
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


CHECKS = {
    "masked_slots": check_masked_slots,
    "zero": check_zero,
    "pull": check_pull,
    "overflow": check_overflow,
    "nan_shows": check_nan_shows,
}
