"""The tokens of a micro-batch as losses, penalties and reductions take them, the counts of the whole update that they
are weighed by, what a loss gives back, and ratios.

Ratios of probabilities are taken by their logarithms, safe against whatever stands in masked slots and against
overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
    teacher_logprobs: torch.Tensor | None = None
    """Of the teachers, at temperature 1; None where one of the tokens has none."""
    correction_weights: torch.Tensor | None = None
    """What each token's policy loss is multiplied by, 0 for rejected ones; None where nothing is corrected."""
    kl_weights: torch.Tensor | None = None
    """Of |log p - log proximal| of each token in the loss; None where no token is held so."""

    def sequence_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the trainable tokens of each sample, [num_sequences]."""
        kept = torch.where(self.mask, values, 0.0)
        return torch.zeros(self.num_sequences, dtype=kept.dtype, device=kept.device).index_add(
            0, self.sequence_index, kept
        )

    def sequence_means(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the trainable tokens of each sample, [num_sequences]; 0 for one that has none."""
        return self.sequence_sums(values) / self.sequence_sums(torch.ones_like(values)).clamp(min=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalCounts:
    """The denominators of one optimizer update, over all micro-batches and ranks."""

    num_tokens: int
    """Trainable tokens."""
    num_sequences: int
    """Sequences with at least one trainable token."""
    num_prompts: int
    """Prompts with at least one trainable token."""
    tokens_of_sequence: Mapping[str, int] = field(default_factory=dict)
    """Trainable tokens by sequence id. Empty: every sample is a sequence of its own."""
    tokens_of_prompt: Mapping[str, int] = field(default_factory=dict)
    """Trainable tokens by prompt id. Empty: every sample is a prompt of its own."""
    by_environment: Mapping[str, GlobalCounts] = field(default_factory=dict)
    """Of the samples of each environment alone, by `TrainSample.environment`. Empty: none has an algorithm of its
    own."""

    @classmethod
    def of(
        cls,
        num_trainable: Iterable[int],
        *,
        sequence_ids: Sequence[str] | None = None,
        prompt_ids: Sequence[str] | None = None,
    ) -> GlobalCounts:
        """Count from the number of trainable tokens of each sample, and which sequence and prompt it is of.

        Without ids every sample is a sequence, or a prompt, of its own.
        """
        numbers = list(num_trainable)
        by_sequence = _add_up(numbers, sequence_ids)
        by_prompt = _add_up(numbers, prompt_ids)
        alone = sum(number > 0 for number in numbers)
        return cls(
            num_tokens=sum(numbers),
            num_sequences=alone if sequence_ids is None else len(by_sequence),
            num_prompts=alone if prompt_ids is None else len(by_prompt),
            tokens_of_sequence=by_sequence,
            tokens_of_prompt=by_prompt,
        )


def _add_up(numbers: Sequence[int], ids: Sequence[str] | None) -> dict[str, int]:
    totals: dict[str, int] = {}
    for number, name in zip(numbers, ids, strict=True) if ids is not None else ():
        if number > 0:
            totals[name] = totals.get(name, 0) + number
    return totals


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
