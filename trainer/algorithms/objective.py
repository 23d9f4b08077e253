"""The objective of one update: which loss, which penalties, how they are reduced; and its sums over a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import ClipLoss, KLInLoss, KLInReward, NoKL, SupervisedLoss, TokenMean
from polyturn.configs.schema.section import Section
from polyturn.trainer.algorithms.kl import k3, kl_penalty
from polyturn.trainer.algorithms.reductions import token_weights, weighted_sum
from polyturn.trainer.algorithms.registry import POLICY_LOSSES, bind
from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch, log_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What an update minimises."""

    loss: Section = field(default_factory=ClipLoss)
    """The policy loss: one of `configs.schema.objective.Loss`."""
    kl: NoKL | KLInLoss | KLInReward = field(default_factory=NoKL)
    """Only a penalty in the loss has a part here; one in the reward is in the advantages already."""
    entropy_coefficient: float = 0.0
    """Of the entropy bonus; 0 turns it off."""
    reduction: Section = field(default_factory=TokenMean)
    """One of `configs.schema.objective.Reduction`."""
    temperature: float = 1.0
    """The sampling temperature: logprobs are those of logits / temperature."""

    @classmethod
    def from_config(cls, config: AlgorithmConfig, *, temperature: float) -> Objective:
        """The objective that a run's config describes."""
        return cls(
            loss=config.loss,
            kl=config.kl,
            entropy_coefficient=config.entropy_coefficient,
            reduction=config.reduction,
            temperature=temperature,
        )

    @property
    def needs_advantages(self) -> bool:
        """Whether its samples must have advantages and the logprobs of the step's start."""
        return not isinstance(self.loss, SupervisedLoss)

    @property
    def needs_reference(self) -> bool:
        """Whether its samples must have the logprobs of the reference."""
        return isinstance(self.kl, KLInLoss) and self.kl.anchor == "reference"


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSums:
    """An objective over part of a batch: add `loss` and `sums` of all parts, take the maximum of `maxima`."""

    loss: torch.Tensor
    """A scalar with gradient, already over the global denominators."""
    sums: dict[str, torch.Tensor]
    """Sums over trainable tokens, without gradient."""
    maxima: dict[str, torch.Tensor]


def evaluate_objective(batch: TokenBatch, objective: Objective, counts: GlobalCounts) -> ObjectiveSums:
    """The objective's sums over a part of the global batch that `counts` describes.

    The loss is sum_it w_it (c_it l_it + beta kl_it - eta H_it): w of the reduction, c of the corrections. A rejected
    token has no policy loss, but is held by the penalties like any other.
    """
    weights = token_weights(batch, counts, objective.reduction)
    token_loss = bind(POLICY_LOSSES, objective.loss)(batch)
    policy_weights = weights if batch.correction_weights is None else weights * _corrections(batch)
    loss = weighted_sum(token_loss.values, policy_weights)
    if isinstance(objective.kl, KLInLoss):
        loss = loss + objective.kl.coefficient * weighted_sum(kl_penalty(batch, objective.kl), weights)
    if objective.entropy_coefficient > 0:
        loss = loss - objective.entropy_coefficient * weighted_sum(batch.entropies, weights)
    sums, maxima = _metrics(batch, token_loss.clipped)
    return ObjectiveSums(loss=loss, sums={"loss": loss.detach(), **sums}, maxima=maxima)


def _corrections(batch: TokenBatch) -> torch.Tensor:
    assert batch.correction_weights is not None
    return torch.where(batch.mask, batch.correction_weights.detach(), 0.0)


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
        "clip_fraction": (clipped & mask).sum().float(),
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
