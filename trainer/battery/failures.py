"""What a check raises, and how two results are compared."""

from __future__ import annotations

import torch


class BatteryFailure(AssertionError):
    """A function breaks one of the rules; the sentence says which, and where."""


def require(condition: bool, sentence: str) -> None:
    """Raise `BatteryFailure` with the sentence unless the condition holds."""
    if not condition:
        raise BatteryFailure(sentence)


def require_equal(found: torch.Tensor, expected: torch.Tensor, what: str, *, tolerance: float = 0.0) -> None:
    """Raise `BatteryFailure` unless two tensors are equal, up to `tolerance` relative to the larger of 1 and each."""
    require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    gap = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    # Not `any(gap > tolerance)`, so that a NaN on either side fails.
    if not bool((gap <= tolerance).all()):
        worst = int(torch.where(gap.isnan(), torch.inf, gap).argmax())
        raise BatteryFailure(
            f"{what}: {found.flatten()[worst].item():.9g} instead of {expected.flatten()[worst].item():.9g} at "
            f"element {worst}"
        )
