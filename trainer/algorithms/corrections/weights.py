"""Importance weights that are bounded."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import IcePop, TruncatedImportance
from polyturn.trainer.algorithms.corrections.sequences import fraction, over_sequences
from polyturn.trainer.algorithms.protocols import CorrectionWeights
from polyturn.trainer.algorithms.ratios import bounded_exp, log_ratio
from polyturn.trainer.algorithms.registry import CORRECTIONS


@CORRECTIONS.register(
    "truncated_importance",
    config=TruncatedImportance,
    paper="1802.01561, 2110.00641",
    formula="min(rho, cap); sequence: min(prod_t rho_t, cap); geometric: min(exp(mean_t log rho_t), cap)",
)
def truncated_importance(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    config: TruncatedImportance,
) -> CorrectionWeights:
    """min(rho, cap), of tokens, sequences or their geometric mean; divided by the mean over the step if so asked, which
    is that of its tokens or of its sequences, as the level is.

    Truncated importance sampling (Ionides 2008; V-trace, arXiv 1802.01561); as the weight of a loss against the
    proximal policy it is decoupled PPO (arXiv 2110.00641, eq. 2).
    """
    logs = log_ratio(proximal, behavior, mask).detach()
    if config.level != "token":
        how = "sum" if config.level == "sequence" else "mean"
        logs = over_sequences(logs, mask, sequence_index, how)
    ratios = bounded_exp(logs)
    clipped = (ratios > config.cap) & mask
    bounded = ratios.clamp(max=config.cap)
    mean = _mean_weight(bounded, mask, sequence_index, of_sequences=config.level != "token")
    if config.normalize and mean != 0:
        bounded = bounded / mean
    return CorrectionWeights(
        weights=torch.where(mask, bounded, 0.0),
        clipped=clipped,
        metrics={"clipped_fraction": fraction(clipped, mask), "mean_weight": mean},
    )


def _mean_weight(
    weights: torch.Tensor, mask: torch.Tensor, sequence_index: torch.Tensor, *, of_sequences: bool
) -> float:
    """Over the trainable tokens, or over the sequences that have some, each counted once whatever its length."""
    shares = mask.to(weights.dtype)
    if of_sequences:
        shares = shares / over_sequences(shares, mask, sequence_index, "sum").clamp(min=1)
    total = float(shares.sum())
    return float((torch.where(mask, weights, 0.0) * shares).sum()) / total if total else 0.0


@CORRECTIONS.register(
    "icepop",
    config=IcePop,
    paper="2510.18855",
    formula="rho 1[low <= rho <= high]",
)
def icepop(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    config: IcePop,
) -> CorrectionWeights:
    """rho where low <= rho <= high, 0 elsewhere (IcePop, arXiv 2510.18855): on both sides, as both are mismatch."""
    ratios = bounded_exp(log_ratio(proximal, behavior, mask).detach())
    rejected = ((ratios < config.low) | (ratios > config.high)) & mask
    weights = torch.where(mask & ~rejected, ratios, 0.0)
    return CorrectionWeights(
        weights=weights,
        metrics={
            "rejected_fraction": fraction(rejected, mask),
            "mean_weight": float(weights.sum()) / max(int(mask.sum()), 1),
        },
    )
