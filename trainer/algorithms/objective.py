"""The objective of one update: which loss, which penalties, how they are reduced; and its sums over a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import ClipLoss, KLInLoss, KLInReward, NoKL, SupervisedLoss, TokenMean
from polyturn.configs.schema.run import RunConfig
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
    by_environment: Mapping[str, Objective] = field(default_factory=dict)
    """Of the environments that have one of their own; this one is then of all others together, and the loss is the
    weighted sum of all."""
    weight: float | None = None
    """In that sum; None: the share of the update's trainable tokens."""

    @classmethod
    def of_run(cls, config: RunConfig) -> Objective:
        """The objective of a run, with those of its environments."""
        temperature = config.rollout.sampling.temperature
        weights = config.loss_weights
        return replace(
            cls.from_config(config.algorithm, temperature=temperature),
            by_environment={
                name: replace(cls.from_config(own, temperature=temperature), weight=weights[name])
                for name, own in config.own_algorithms.items()
            },
        )

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
        """Whether samples must have advantages and the logprobs of the step's start."""
        every = (self, *self.by_environment.values())
        return any(not isinstance(objective.loss, SupervisedLoss) for objective in every)

    @property
    def needs_reference(self) -> bool:
        """Whether samples must have the logprobs of the reference."""
        every = (self, *self.by_environment.values())
        penalties = [objective.kl for objective in every]
        return any(isinstance(kl, KLInLoss) and kl.anchor == "reference" for kl in penalties)


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

    The loss is sum_it w_it (c_it l_it + beta kl_it + g_it |log p_it - log proximal_it| - eta H_it): w of the reduction,
    c of the corrections and the entropy control, g of the entropy control. A rejected token has no policy loss, but is
    held by the penalties like any other.
    """
    weights = token_weights(batch, counts, objective.reduction)
    token_loss = bind(POLICY_LOSSES, objective.loss)(batch)
    policy_weights = weights if batch.correction_weights is None else weights * _corrections(batch)
    loss = weighted_sum(token_loss.values, policy_weights)
    if isinstance(objective.kl, KLInLoss):
        loss = loss + objective.kl.coefficient * weighted_sum(kl_penalty(batch, objective.kl), weights)
    if batch.kl_weights is not None:
        moved = log_ratio(batch.logprobs, batch.proximal_logprobs.detach(), batch.mask).abs()
        loss = loss + weighted_sum(moved, weights * torch.where(batch.mask, batch.kl_weights, 0.0))
    if objective.entropy_coefficient > 0:
        loss = loss - objective.entropy_coefficient * weighted_sum(batch.entropies, weights)
    sums, maxima = _metrics(batch, token_loss.clipped)
    return ObjectiveSums(loss=loss, sums={"loss": loss.detach(), **sums}, maxima=maxima)


FIGURES_BY_ENVIRONMENT = ("loss", "clip_fraction", "entropy", "policy_kl")
"""What is told of each environment that has an objective of its own, as `environment/ID/train/NAME`."""


def figure_of(environment: str, name: str) -> str:
    """The key of one of these figures in an update's metrics; of what has no objective of its own under `others`."""
    return f"environment/{environment or 'others'}/train/{name}"


def evaluate_by_environment(
    batches: Mapping[str, TokenBatch], objective: Objective, counts: GlobalCounts
) -> ObjectiveSums:
    """The same of an update with several objectives: the sum over environments of weight times loss.

    Each loss is over its environment's own denominators. An environment that has no token here has sums of 0, so that
    all parts of an update have the same names.

    Args:
        batches: the part's tokens by `TrainSample.environment`, none of them empty.
    """
    found = {
        name: evaluate_objective(
            batch, objective.by_environment.get(name, objective), counts.by_environment[name]
        )
        for name, batch in batches.items()
    }
    weights = {name: _weight_of(name, objective, counts) for name in found}
    loss = torch.stack([weights[name] * part.loss for name, part in found.items()]).sum()
    parts = list(found.values())
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    maxima = {name: torch.stack([part.maxima[name] for part in parts]).max() for name in parts[0].maxima}
    nothing = torch.zeros_like(loss.detach())
    by_environment = {
        figure_of(environment, name): found[environment].sums[name] if environment in found else nothing
        for environment in counts.by_environment
        for name in FIGURES_BY_ENVIRONMENT
    }
    return ObjectiveSums(loss=loss, sums={**sums, "loss": loss.detach(), **by_environment}, maxima=maxima)


def _weight_of(environment: str, objective: Objective, counts: GlobalCounts) -> float:
    own = objective.by_environment.get(environment)
    if own is not None and own.weight is not None:
        return own.weight
    return counts.by_environment[environment].num_tokens / max(counts.num_tokens, 1)


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
