"""The tokens of a micro-batch as losses, penalties and reductions take them, what a loss gives back, and their ratios.

Ratios of probabilities are taken by their logarithms, safe against whatever stands in masked slots and against
overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBatch:
    """N tokens of whole samples; all tensors are of shape [N]. What stands where `mask` is False means nothing.

    A sample is one context with the tokens that the policy wrote in it. All trainable tokens of a sample are in one
    batch, so what is computed by sample needs no other batch. A *sequence* is what counts once in a reduction: an
    episode over all its samples, which may lie in several batches; its length is therefore given.
    """

    logprobs: torch.Tensor
    """Of the policy as it is, with gradient."""
    entropies: torch.Tensor
    """Of the policy's distribution at each token, with gradient."""
    mask: torch.Tensor
    """bool: the trainable tokens."""
    sequence_index: torch.Tensor
    """int64: which sample of the batch a token is of, from 0 to `num_sequences` - 1."""
    num_sequences: int
    """Samples in the batch, those without a trainable token included."""
    sequence_lengths: torch.Tensor
    """Trainable tokens of the token's sequence, over all its samples in the whole update."""
    prompt_lengths: torch.Tensor
    """Trainable tokens of all sequences of the token's prompt in the whole update."""
    turns: torch.Tensor
    """int: the turn of each token in its episode."""
    policy_versions: torch.Tensor
    """int: of the weights that drew each token."""
    advantages: torch.Tensor
    behavior_logprobs: torch.Tensor
    """Of the sampler that drew the tokens, as it recorded them."""
    proximal_logprobs: torch.Tensor
    """Of the trainer's policy at the start of the step."""
    reference_logprobs: torch.Tensor | None = None
    """Of the frozen reference policy; only where the objective has a KL to it."""
    correction_weights: torch.Tensor | None = None
    """What each token's policy loss is multiplied by, 0 for rejected ones; None where nothing is corrected."""

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the trainable tokens of each sample, [num_sequences]."""
        kept = torch.where(self.mask, values, 0.0)
        return torch.zeros(self.num_sequences, dtype=kept.dtype, device=kept.device).index_add(
            0, self.sequence_index, kept
        )

    def sequence_means(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the trainable tokens of each sample, [num_sequences]; 0 for one that has none."""
        return self.sequence_sums(values) / self.sequence_sums(torch.ones_like(values)).clamp(min=1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenLoss:
    """A loss of each token, [N]; 0, without gradient, where the mask is."""

    values: torch.Tensor
    clipped: torch.Tensor
    """bool: trainable tokens whose gradient the loss bounded or took away."""


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
