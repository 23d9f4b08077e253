"""The columns of a pack at its trainable tokens, as the objective takes them.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.algorithms.tokens import TokenBatch
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.packed import PackedBatch, gather_rows


def token_batch(
    batch: PackedBatch,
    objective: Objective,
    counts: GlobalCounts,
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
) -> TokenBatch:
    """The pack's columns at its trainable tokens.

    Args:
        counts: of the whole update, whose sequences and prompts the pack's samples are of.

    Raises:
        ValueError: a sample lacks a column that the objective needs.
    """
    samples = batch.samples
    behavior = gather_rows(batch, [sample.behavior_logprobs for sample in samples])
    proximal, reference, advantages = behavior, None, torch.zeros_like(behavior)
    if objective.needs_advantages or all(sample.proximal_logprobs is not None for sample in samples):
        proximal = gather_rows(batch, [_column(sample, "proximal_logprobs") for sample in samples])
    if objective.needs_advantages:
        advantages = gather_rows(batch, [_column(sample, "advantages") for sample in samples])
    if objective.needs_reference:
        reference = gather_rows(batch, [_column(sample, "reference_logprobs") for sample in samples])
    corrections = None
    if any(sample.correction_weights is not None for sample in samples):
        corrections = gather_rows(batch, [_column(sample, "correction_weights") for sample in samples])
    return TokenBatch(
        logprobs=logprobs,
        entropies=entropies,
        mask=torch.ones_like(logprobs, dtype=torch.bool),
        sequence_index=batch.sample_of_row,
        num_sequences=len(samples),
        sequence_lengths=_of_rows(
            batch, [_total(s, counts.tokens_of_sequence, s.sequence_id) for s in samples]
        ),
        prompt_lengths=_of_rows(batch, [_total(s, counts.tokens_of_prompt, s.group_id) for s in samples]),
        turns=_integers(batch, [sample.turns for sample in samples]),
        policy_versions=_integers(batch, [sample.policy_versions for sample in samples]),
        advantages=advantages,
        behavior_logprobs=behavior,
        proximal_logprobs=proximal,
        reference_logprobs=reference,
        correction_weights=corrections,
    )


def _integers(batch: PackedBatch, columns: Sequence[np.ndarray]) -> torch.Tensor:
    """One column of integers of each sample [T] -> its values at the trainable tokens, int64 [N]."""
    parts = [column[sample.sampled] for sample, column in zip(batch.samples, columns, strict=True)]
    values = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    return torch.from_numpy(values).to(batch.rows.device)


def _total(sample: TrainSample, totals: Mapping[str, int], name: str) -> int:
    """The trainable tokens of what the sample is part of. Totals leave out what has none, and may be of nothing."""
    return totals[name] if totals and sample.num_trainable else sample.num_trainable


def _of_rows(batch: PackedBatch, by_sample: Sequence[int]) -> torch.Tensor:
    """A number of each sample at each of its trainable tokens, int64 [N]."""
    return torch.tensor(by_sample or [0], device=batch.rows.device)[batch.sample_of_row]


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
    if tokens.correction_weights is not None:
        columns["correction weight"] = tokens.correction_weights
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
