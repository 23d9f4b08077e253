"""Probability ratios by their logarithms, safe against whatever stands in masked slots and against overflow."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before exp: a ratio of 5e8 is as good as any larger one, and finite."""


def log_ratio(logprobs: torch.Tensor, anchor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log(policy / anchor) at trainable tokens, 0 elsewhere, whatever stands in masked slots. All of one shape."""
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, anchor, 0.0)


def bounded_exp(log_ratios: torch.Tensor) -> torch.Tensor:
    """exp with its argument clamped to MAX_LOG_RATIO on both sides; without gradient beyond."""
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def is_beyond_bound(log_ratios: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """At which trainable tokens `bounded_exp` cuts: what takes its gradient through it has none there."""
    return (log_ratios.detach().abs() > MAX_LOG_RATIO) & mask
