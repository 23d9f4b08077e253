"""Random micro-batches as rows, one for each sample, and what may be done to rows without changing what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch

FLOATS = (
    "logprobs",
    "entropies",
    "advantages",
    "behavior_logprobs",
    "proximal_logprobs",
    "reference_logprobs",
    "correction_weights",
)
INTEGERS = ("turns", "policy_versions")
LEAVES = ("logprobs", "entropies")
"""The columns that carry a gradient."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Row:
    """One sample."""

    columns: Mapping[str, torch.Tensor]
    """[T] each: those of `TokenBatch` in FLOATS and INTEGERS, and `cotangents`, the weight of each token in a sum that
    gradients are taken of."""
    mask: torch.Tensor
    sequence: str
    prompt: str

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def num_trainable(self) -> int:
        return int(self.mask.sum())

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Row:
        """The row with each column changed, the mask, too."""
        columns = {name: change(column) for name, column in self.columns.items()}
        return replace(self, columns=columns, mask=change(self.mask))

    def having(self, **columns: torch.Tensor) -> Row:
        """The row with other columns in the place of some."""
        return replace(self, columns={**self.columns, **columns})


def random_rows(
    seed: int = 0, *, lengths: Sequence[int] = (6, 9, 4, 1, 7, 5, 3), dtype: torch.dtype = torch.float64
) -> tuple[Row, ...]:
    """Ragged samples with masked tokens between trainable ones. The third has no trainable token at all, every fourth
    is another context of the sequence before it, and two or three sequences are of one prompt. Ratios lie on both
    sides of any usual bound, advantages have both signs, and in half of the rows differ from token to token.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(length: int, scale: float) -> torch.Tensor:
        return (torch.randn(length, generator=generator, dtype=torch.float64) * scale).to(dtype)

    rows: list[Row] = []
    for index, length in enumerate(lengths):
        mask = torch.rand(length, generator=generator) < 0.6
        if index == 2:
            mask[:] = False
        elif not mask.any():
            mask[-1] = True
        logprobs = -noise(length, 1.0).abs() - 0.6
        advantages = noise(length, 1.0) if index % 2 else noise(1, 1.0).repeat(length)
        again = index % 4 == 3
        columns = {
            "logprobs": logprobs,
            "entropies": noise(length, 1.0).abs(),
            "advantages": advantages,
            "behavior_logprobs": logprobs + noise(length, 0.35),
            "proximal_logprobs": logprobs + noise(length, 0.25),
            "reference_logprobs": logprobs + noise(length, 0.5),
            "correction_weights": noise(length, 0.5).abs(),
            "turns": torch.arange(length) // 3,
            "policy_versions": torch.randint(0, 5, (1,), generator=generator).repeat(length),
            "cotangents": noise(length, 1.0) + 2,
        }
        sequence = rows[-1].sequence if again else f"sequence-{index}"
        prompt = rows[-1].prompt if again else f"prompt-{index // 3}"
        rows.append(Row(columns=columns, mask=mask, sequence=sequence, prompt=prompt))
    return tuple(rows)


def count(rows: Sequence[Row]) -> GlobalCounts:
    """The denominators of an update that consists of these rows."""
    return GlobalCounts.of(
        [row.num_trainable for row in rows],
        sequence_ids=[row.sequence for row in rows],
        prompt_ids=[row.prompt for row in rows],
    )


def to_batch(rows: Sequence[Row], counts: GlobalCounts) -> TokenBatch:
    """The rows as one micro-batch of the update that `counts` describes; `LEAVES` ask for a gradient."""

    def joined(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=dtype)

    dtype = rows[0].columns["logprobs"].dtype if rows else torch.float64
    columns = {
        name: joined([row.columns[name] for row in rows], dtype if name in FLOATS else torch.int64)
        for name in FLOATS + INTEGERS
    }
    for name in LEAVES:
        columns[name] = columns[name].clone().requires_grad_()
    of_sequence = [counts.tokens_of_sequence.get(row.sequence, 0) for row in rows]
    of_prompt = [counts.tokens_of_prompt.get(row.prompt, 0) for row in rows]
    return TokenBatch(
        **columns,
        mask=joined([row.mask for row in rows], torch.bool).bool(),
        sequence_index=joined(
            [torch.full((len(row),), index) for index, row in enumerate(rows)], torch.int64
        ),
        num_sequences=len(rows),
        sequence_lengths=joined(
            [torch.full((len(row),), number) for row, number in zip(rows, of_sequence, strict=True)],
            torch.int64,
        ),
        prompt_lengths=joined(
            [torch.full((len(row),), number) for row, number in zip(rows, of_prompt, strict=True)],
            torch.int64,
        ),
    )


def split_by_row(rows: Sequence[Row], tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor over the tokens of a batch, cut into the tokens of each row."""
    return list(tensor.split([len(row) for row in rows])) if rows else []


def without_masked(row: Row) -> Row:
    """The row with its masked tokens deleted."""
    return row.map(lambda column: column[row.mask])


def padded(row: Row, length: int) -> Row:
    """The row with masked tokens after it, whose columns repeat what stands at its beginning."""
    longer = row.map(lambda column: torch.cat([column, column[:1].expand(length)]))
    return replace(longer, mask=torch.cat([row.mask, torch.zeros(length, dtype=torch.bool)]))


def poisoned(row: Row, poison: float) -> Row:
    """The row with `poison` in all masked slots of its float columns, and nonsense in those of the others."""
    changed = {name: torch.where(row.mask, row.columns[name], poison) for name in FLOATS}
    changed |= {name: torch.where(row.mask, row.columns[name], 10**6) for name in INTEGERS}
    return row.having(**changed)
