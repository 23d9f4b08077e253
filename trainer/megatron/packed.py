"""A micro-batch as tensors: its samples side by side, and the rows where a trainable token is predicted.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from polyturn.trainer.batch import TrainSample
from polyturn.trainer.megatron.attention import PackedSequences, pack_lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """T packed tokens with N trainable ones among them."""

    samples: tuple[TrainSample, ...]
    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[1, T]"""
    sequences: PackedSequences
    rows: torch.Tensor
    """[N]: the position in the pack whose logits predict a trainable token, sample by sample."""
    targets: torch.Tensor
    """[N]: that token."""
    sample_of_row: torch.Tensor
    """[N]: the index in `samples`."""


def predicting_rows(sampled: np.ndarray) -> np.ndarray:
    """Where the trainable tokens are predicted: token t by the logits at t - 1. The one shift that there is."""
    return np.flatnonzero(sampled) - 1


def make_packed_batch(
    samples: Sequence[TrainSample], *, device: torch.device, multiple: int = 1
) -> PackedBatch:
    """Lay samples side by side; the pack is filled up to a multiple of `multiple` tokens with a sequence nobody reads.

    No samples make a pack of `multiple` such tokens.
    """
    lengths = [len(sample) for sample in samples]
    num_filling = -sum(lengths) % multiple if lengths else multiple
    starts = np.cumsum([0, *lengths])[:-1] if lengths else np.zeros(0, dtype=np.int64)
    rows = [predicting_rows(sample.sampled) + start for sample, start in zip(samples, starts, strict=True)]
    token_ids = [sample.token_ids for sample in samples]
    sample_of_row = np.repeat(np.arange(len(samples)), [len(r) for r in rows])
    if num_filling:
        lengths = [*lengths, num_filling]
        token_ids = [*token_ids, np.zeros(num_filling, dtype=np.int64)]
    positions = np.concatenate([np.arange(length) for length in lengths])
    all_rows = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    all_tokens = np.concatenate(token_ids)
    return PackedBatch(
        samples=tuple(samples),
        input_ids=torch.from_numpy(all_tokens)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        sequences=pack_lengths(lengths, device),
        rows=torch.from_numpy(all_rows).to(device),
        targets=torch.from_numpy(all_tokens[all_rows + 1]).to(device),
        sample_of_row=torch.from_numpy(sample_of_row).to(device),
    )


def gather_rows(batch: PackedBatch, columns: Sequence[np.ndarray]) -> torch.Tensor:
    """One column of each sample [T] -> its values at the trainable tokens, [N], float32."""
    parts = [column[sample.sampled] for sample, column in zip(batch.samples, columns, strict=True)]
    values = np.concatenate([np.zeros(0, dtype=np.float32), *parts]).astype(np.float32)
    return torch.from_numpy(values).to(batch.rows.device)


def scatter_rows(batch: PackedBatch, values: torch.Tensor) -> list[np.ndarray]:
    """Values [N] at the trainable tokens -> a float32 column [T] for each sample, 0 elsewhere."""
    flat = values.detach().float().cpu().numpy()
    columns = []
    offset = 0
    for sample in batch.samples:
        column = np.zeros(len(sample), dtype=np.float32)
        column[sample.sampled] = flat[offset : offset + sample.num_trainable]
        offset += sample.num_trainable
        columns.append(column)
    return columns
