"""An off-policy correction of one's own: tempered importance weights."""

from __future__ import annotations

import torch

from polyturn.trainer.algorithms.protocols import CorrectionWeights
from polyturn.trainer.algorithms.tokens import bounded_exp, log_ratio


def tempered(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    _sequence_index: torch.Tensor,
    _advantages: torch.Tensor,
    *,
    power: float = 0.5,
    cap: float = 2.0,
) -> CorrectionWeights:
    """min(rho ** power, cap) with rho = proximal / behavior: power 0 corrects nothing, 1 is truncated importance.

    In between there is some bias for less variance.
    """
    ratios = bounded_exp(power * log_ratio(proximal, behavior, mask).detach())
    weights = torch.where(mask, ratios.clamp(max=cap), 0.0)
    capped = int(((ratios > cap) & mask).sum())
    return CorrectionWeights(weights=weights, metrics={"capped_fraction": capped / max(int(mask.sum()), 1)})
