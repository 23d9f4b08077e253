"""From per-token values to one number, with the denominators of the whole optimizer update.

A reduction is a weight for each token: the loss is the sum of weight times value. The weights come from the global
batch, before it is split into micro-batches or over ranks, so the sum over all parts is the same however it is split,
and gradients of the parts are added, never averaged. Tokens that a correction rejects stay in the denominators:
without them, a batch in which few tokens are left would make steps as large as a full one.
"""

from __future__ import annotations

import torch

from polyturn.configs.schema import objective as sections
from polyturn.configs.schema.section import Section
from polyturn.trainer.algorithms.registry import REDUCERS, bind
from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch


def token_weights(batch: TokenBatch, counts: GlobalCounts, config: Section) -> torch.Tensor:
    """The weight of each token under the reduction that the section names, [N]; 0 where the mask is False."""
    weights = bind(REDUCERS, config)(batch.mask, batch, counts)
    return torch.where(batch.mask, weights, 0.0)


def weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of weight times value. A value whose weight is 0 has no part in it, not even as NaN."""
    return (torch.where(weights != 0, values, 0.0) * weights).sum()


@REDUCERS.register(
    "token_mean", config=sections.TokenMean, paper="2503.14476", formula="sum_it m_it l_it / N"
)
def token_mean(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, config: sections.TokenMean
) -> torch.Tensor:
    """1 / N for the N trainable tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return _ones(mask) / max(counts.num_tokens, 1)


@REDUCERS.register(
    "sequence_mean",
    config=sections.SequenceMean,
    paper="2402.03300",
    formula="1/B sum_i (sum_t m_it l_it / sum_t m_it)",
)
def sequence_mean(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, config: sections.SequenceMean
) -> torch.Tensor:
    """1 / (B n_i) for sequence i with n_i trainable tokens (GRPO, arXiv 2402.03300, eq. 3)."""
    return _ones(mask) / (max(counts.num_sequences, 1) * batch.sequence_lengths.clamp(min=1))


@REDUCERS.register(
    "sequence_sum",
    config=sections.SequenceSum,
    paper="2503.20783",
    formula="1/B sum_it m_it l_it",
)
def sequence_sum(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, config: sections.SequenceSum
) -> torch.Tensor:
    """1 / B: the gradient of the expected return of a sequence, without length bias (arXiv 2503.20783, sec. 3)."""
    return _ones(mask) / max(counts.num_sequences, 1)


@REDUCERS.register(
    "sequence_sum_norm",
    config=sections.SequenceSumNorm,
    paper="2503.20783",
    formula="1/(B L) sum_it m_it l_it, L a constant",
    example={"length": 16},
)
def sequence_sum_norm(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, config: sections.SequenceSumNorm
) -> torch.Tensor:
    """1 / (B L) with a constant L (Dr.GRPO, arXiv 2503.20783, sec. 3.2)."""
    return _ones(mask) / (max(counts.num_sequences, 1) * config.length)


@REDUCERS.register(
    "prompt_mean",
    config=sections.PromptMean,
    paper="2510.13786",
    formula="1/P sum_p (sum_{i in p, t} m_it l_it / sum_{i in p, t} m_it)",
)
def prompt_mean(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, config: sections.PromptMean
) -> torch.Tensor:
    """1 / (P n_p) for prompt p of P with n_p trainable tokens over all its sequences."""
    return _ones(mask) / (max(counts.num_prompts, 1) * batch.prompt_lengths.clamp(min=1))


@REDUCERS.register("token_sum", config=sections.TokenSum, paper="Williams 1992", formula="sum_it m_it l_it")
def token_sum(
    mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts, config: sections.TokenSum
) -> torch.Tensor:
    """1: what a service that leaves the denominators to its users computes."""
    return _ones(mask)


def _ones(mask: torch.Tensor) -> torch.Tensor:
    return mask.to(torch.float32)
