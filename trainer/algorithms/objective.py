"""The objective of one update: which loss, which penalties, how they are reduced; and its sums over a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from polyturn.configs.algorithm import AlgorithmConfig
from polyturn.trainer.algorithms.kl import k2, k3
from polyturn.trainer.algorithms.losses import clip_loss, log_ratio, supervised_loss
from polyturn.trainer.algorithms.reductions import GlobalCounts, Reduction, token_weights, weighted_sum


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What an update minimises."""

    loss: Literal["clip", "supervised"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 0.0
    """Of the k2 penalty to the reference policy; 0 turns it off."""
    entropy_coefficient: float = 0.0
    """Of the entropy bonus; 0 turns it off."""
    reduction: Reduction = "token_mean"
    temperature: float = 1.0
    """The sampling temperature: logprobs are those of logits / temperature."""

    @classmethod
    def from_config(cls, config: AlgorithmConfig, *, temperature: float) -> Objective:
        """The objective that a run's config describes."""
        return cls(
            loss=config.loss.kind,
            clip_low=config.loss.clip_low,
            clip_high=config.loss.clip_high,
            kl_coefficient=config.kl.coefficient if config.kl.kind == "in_loss" else 0.0,
            entropy_coefficient=config.entropy_coefficient,
            reduction=config.reduction,
            temperature=temperature,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """The tokens of a micro-batch, all tensors of one shape. `reference_logprobs` only where the objective has a KL."""

    logprobs: torch.Tensor
    """Of the policy, with gradient."""
    entropies: torch.Tensor
    mask: torch.Tensor
    sequence_lengths: torch.Tensor
    """Trainable tokens of the token's whole sequence."""
    advantages: torch.Tensor
    behavior_logprobs: torch.Tensor
    proximal_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSums:
    """An objective over part of a batch: add `loss` and `sums` of all parts, take the maximum of `maxima`."""

    loss: torch.Tensor
    """A scalar with gradient, already over the global denominators."""
    sums: dict[str, torch.Tensor]
    """Sums over trainable tokens, without gradient."""
    maxima: dict[str, torch.Tensor]


def evaluate_objective(batch: TokenBatch, objective: Objective, counts: GlobalCounts) -> ObjectiveSums:
    """The objective's sums over a part of the global batch that `counts` describes."""
    mask = batch.mask
    weights = token_weights(mask, batch.sequence_lengths, reduction=objective.reduction, counts=counts)
    if objective.loss == "supervised":
        token_loss = supervised_loss(batch.logprobs, mask)
    else:
        token_loss = clip_loss(
            batch.logprobs,
            batch.proximal_logprobs,
            batch.advantages,
            mask,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
        )
    loss = weighted_sum(token_loss.values, weights)
    if objective.kl_coefficient > 0:
        assert batch.reference_logprobs is not None, "a KL penalty needs reference logprobs"
        penalty = k2(batch.logprobs, batch.reference_logprobs.detach(), mask)
        loss = loss + objective.kl_coefficient * weighted_sum(penalty, weights)
    if objective.entropy_coefficient > 0:
        loss = loss - objective.entropy_coefficient * weighted_sum(batch.entropies, weights)
    sums, maxima = _metrics(batch, token_loss.clipped)
    return ObjectiveSums(loss=loss, sums={"loss": loss.detach(), **sums}, maxima=maxima)


@torch.no_grad()
def _metrics(
    batch: TokenBatch, clipped: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sums over trainable tokens, and largest absolute values."""
    mask, logprobs = batch.mask, batch.logprobs.detach()
    policy_change = log_ratio(logprobs, batch.proximal_logprobs, mask)
    difference = log_ratio(logprobs, batch.behavior_logprobs, mask).abs()
    sums = {
        "num_tokens": mask.sum().float(),
        "clip_fraction": clipped.sum().float(),
        "entropy": torch.where(mask, batch.entropies, 0.0).sum(),
        "policy_kl": k3(logprobs, batch.proximal_logprobs, mask).sum(),
        "ratio": torch.where(mask, policy_change.exp(), 0.0).sum(),
        "logprob_difference": difference.sum(),
        "behavior_kl": k3(batch.behavior_logprobs, logprobs, mask).sum(),
    }
    if batch.reference_logprobs is not None:
        sums["reference_kl"] = k3(logprobs, batch.reference_logprobs, mask).sum()
    zero = torch.zeros((), device=mask.device)
    maxima = {
        "policy_logratio_max": policy_change.abs().max() if mask.numel() else zero,
        "logprob_difference_max": difference.max() if mask.numel() else zero,
    }
    return sums, maxima
