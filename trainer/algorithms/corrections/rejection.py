"""Corrections that leave out: weights of 0 and 1."""

from __future__ import annotations

import torch

from polyturn.configs.schema.objective import (
    DivergenceRejection,
    GeometricRejection,
    OffPolicySequenceMask,
    Veto,
)
from polyturn.trainer.algorithms.corrections.sequences import fraction, over_sequences, sequence_fraction
from polyturn.trainer.algorithms.kl import k1, k2, k3
from polyturn.trainer.algorithms.protocols import CorrectionWeights
from polyturn.trainer.algorithms.ratios import bounded_exp, log_ratio
from polyturn.trainer.algorithms.registry import CORRECTIONS

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
