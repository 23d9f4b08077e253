"""The columns of a pack at its trainable tokens, as the objective takes them.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from typing import Any

import torch

from polyturn.trainer.algorithms.objective import Objective, TokenBatch
from polyturn.trainer.megatron.packed import PackedBatch, gather_rows


def token_batch(
    batch: PackedBatch, objective: Objective, logprobs: torch.Tensor, entropies: torch.Tensor
) -> TokenBatch:
    """The pack's columns at its trainable tokens.

    Raises:
        ValueError: a sample lacks a column that the objective needs.
    """
    device = logprobs.device
    behavior = gather_rows(batch, [sample.behavior_logprobs for sample in batch.samples])
    proximal, reference, advantages = behavior, None, torch.zeros_like(behavior)
    if objective.loss == "clip":
        proximal = gather_rows(batch, [_column(sample, "proximal_logprobs") for sample in batch.samples])
        advantages = gather_rows(batch, [_column(sample, "advantages") for sample in batch.samples])
    if objective.kl_coefficient > 0:
        reference = gather_rows(batch, [_column(sample, "reference_logprobs") for sample in batch.samples])
    lengths = torch.tensor([sample.num_trainable for sample in batch.samples] or [0], device=device)
    return TokenBatch(
        logprobs=logprobs,
        entropies=entropies,
        mask=torch.ones_like(logprobs, dtype=torch.bool),
        sequence_lengths=lengths[batch.sample_of_row],
        advantages=advantages,
        behavior_logprobs=behavior,
        proximal_logprobs=proximal,
        reference_logprobs=reference,
    )


def _column(sample: Any, name: str) -> Any:
    column = getattr(sample, name)
    if column is None:
        raise ValueError(f"sample {sample.sample_id} has no {name}, which the objective needs")
    return column


def find_bad_samples(batch: PackedBatch, tokens: TokenBatch) -> list[str]:
    """A sentence for each sample with a number on a trainable token that is not finite."""
    columns = {
        "logprob": tokens.logprobs.detach(),
        "behavior logprob": tokens.behavior_logprobs,
        "proximal logprob": tokens.proximal_logprobs,
        "advantage": tokens.advantages,
    }
    if tokens.reference_logprobs is not None:
        columns["reference logprob"] = tokens.reference_logprobs
    table = torch.stack(list(columns.values()))
    if bool(torch.isfinite(table).all()):
        return []
    found: dict[str, str] = {}
    names = list(columns)
    for column, row in (~torch.isfinite(table)).nonzero().tolist():
        sample = batch.samples[int(batch.sample_of_row[row])]
        first_row = int((batch.sample_of_row == batch.sample_of_row[row]).nonzero()[0])
        token = int(sample.sampled.nonzero()[0][row - first_row])
        found.setdefault(
            sample.sample_id,
            f"sample {sample.sample_id}: the {names[column]} of token {token} is {table[column, row].item()}",
        )
    return list(found.values())
