"""Off-policy corrections, once a step over all its tokens: importance weights, and what is rejected."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import (
    DivergenceRejection,
    GeometricRejection,
    IcePop,
    OffPolicySequenceMask,
    TruncatedImportance,
    Veto,
)
from polyturn.trainer.algorithms.kl import k1, k2, k3
from polyturn.trainer.algorithms.protocols import CorrectionWeights
from polyturn.trainer.algorithms.registry import CORRECTIONS
from polyturn.trainer.algorithms.tokens import bounded_exp, log_ratio


def over_sequences(
    values: torch.Tensor, mask: torch.Tensor, sequence_index: torch.Tensor, how: str
) -> torch.Tensor:
    """The sum, mean or max over the trainable tokens of each token's sequence, [N]; 0 for a sequence without any."""
    count = int(sequence_index.max()) + 1 if len(sequence_index) else 0
    index, kept = sequence_index[mask], values[mask]
    if how == "max":
        # A NaN is kept by amax; -inf is what a sequence without trainable tokens is left with.
        found = torch.full((count,), -torch.inf, dtype=values.dtype, device=values.device)
        found = found.scatter_reduce(0, index, kept, reduce="amax")
        return torch.where(found == -torch.inf, 0.0, found)[sequence_index]
    sums = torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, index, kept)
    if how == "mean":
        sums = sums / torch.bincount(index, minlength=count).clamp(min=1)
    return sums[sequence_index]


def fraction(part: torch.Tensor, mask: torch.Tensor) -> float:
    """The part of the trainable tokens at which `part` is true; 0 where there are none."""
    return float((part & mask).sum()) / max(int(mask.sum()), 1)


def sequence_fraction(part: torch.Tensor, mask: torch.Tensor, sequence_index: torch.Tensor) -> float:
    """The part of the sequences with trainable tokens in which `part` is true at one of these; 0 without any."""
    found = len(torch.unique(sequence_index[part & mask]))
    return found / max(len(torch.unique(sequence_index[mask])), 1)


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


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@CORRECTIONS.register(
    "geometric_rejection",
    config=GeometricRejection,
    paper="verl's rollout correction",
    formula="1[low <= exp(mean_t log rho_t) <= high]",
)
def geometric_rejection(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    config: GeometricRejection,
) -> CorrectionWeights:
    """Keep a sequence where the geometric mean of rho over its trainable tokens is between low and high."""
    logs = log_ratio(proximal, behavior, mask).detach()
    means = bounded_exp(over_sequences(logs, mask, sequence_index, "mean"))
    return _keep((means >= config.low) & (means <= config.high), means, mask, sequence_index)


@CORRECTIONS.register(
    "divergence_rejection",
    config=DivergenceRejection,
    paper="verl's rollout correction",
    formula="1[sum, mean or max_t k(behavior, proximal) <= threshold]",
    example={"threshold": 0.02},
)
def divergence_rejection(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    config: DivergenceRejection,
) -> CorrectionWeights:
    """Keep a sequence where k1, k2 or k3 of KL(behavior || proximal), over its trainable tokens, is small enough."""
    values = ESTIMATORS[config.estimator](behavior.detach(), proximal.detach(), mask)
    estimates = over_sequences(values, mask, sequence_index, config.over_tokens)
    return _keep(estimates <= config.threshold, estimates, mask, sequence_index)


@CORRECTIONS.register(
    "veto",
    config=Veto,
    paper="verl's rollout correction",
    formula="1[low <= rho_t <= high for all t of the sequence]",
)
def veto(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    config: Veto,
) -> CorrectionWeights:
    """Keep a sequence where rho of every trainable token is between low and high."""
    ratios = bounded_exp(log_ratio(proximal, behavior, mask).detach())
    outlier = torch.where(ratios.isnan(), ratios, ((ratios < config.low) | (ratios > config.high)).to(ratios))
    worst = over_sequences(outlier, mask, sequence_index, "max")
    return _keep(worst == 0, worst, mask, sequence_index)


@CORRECTIONS.register(
    "off_policy_sequence_mask",
    config=OffPolicySequenceMask,
    paper="2512.02556",
    formula="1[A >= 0 or mean_t (log behavior - log proximal) <= threshold]",
    example={"threshold": 0.05},
)
def off_policy_sequence_mask(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
    config: OffPolicySequenceMask,
) -> CorrectionWeights:
    """Reject tokens with A < 0 in sequences whose mean log behavior - log proximal is above the threshold.

    DeepSeek-V3.2 (arXiv 2512.02556, sec. 3.1), with the policy at the start of the step in place of the one at each
    update. The mean is over trainable tokens: observations have no part in it.
    """
    means = over_sequences(-log_ratio(proximal, behavior, mask).detach(), mask, sequence_index, "mean")
    negative = torch.where(mask, advantages, 0.0) < 0
    return _keep(~negative | (means <= config.threshold), means, mask, sequence_index)


def _keep(
    kept: torch.Tensor, evidence: torch.Tensor, mask: torch.Tensor, sequence_index: torch.Tensor
) -> CorrectionWeights:
    """Weights of 1 where `kept`, 0 elsewhere; NaN where the evidence is, so that nobody takes it for a rejection."""
    rejected = ~kept & mask & ~evidence.isnan()
    weights = torch.where(evidence.isnan(), evidence, kept.to(evidence))
    return CorrectionWeights(
        weights=torch.where(mask, weights, 0.0),
        metrics={
            "rejected_fraction": fraction(rejected, mask),
            "rejected_sequences": sequence_fraction(rejected, mask, sequence_index),
        },
    )
