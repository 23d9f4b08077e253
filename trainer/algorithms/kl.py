"""Estimators of KL(policy || other) from one sample per token (Schulman 2020), with d = log policy - log other.

Their expectations under the policy agree (k2's only nearly); their gradients as loss terms do not: k1 has none, k3 has
the gradient of the other direction, and k2 alone has that of KL(policy || other). So the loss uses k2; k1 and k3 are
metrics.
"""

from __future__ import annotations

import torch

from polyturn.trainer.algorithms.losses import log_ratio


def k1(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """d: unbiased, of any sign."""
    return log_ratio(logprobs, other, mask)


def k2(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """d^2 / 2. Nothing is clamped: the further a token drifted, the harder it is pulled back."""
    return log_ratio(logprobs, other, mask).square() / 2


def k3(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """exp(-d) - 1 + d: unbiased and never negative."""
    difference = log_ratio(logprobs, other, mask)
    return torch.expm1(-difference) + difference
