"""A micro-batch as tensors: its samples side by side, and the rows where a trainable token is predicted.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polyturn.trainer.data.prefix_tree import Sharing
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.attention import PackedSequences, pack_lengths
from polyturn.trainer.megatron.context import ContextSlice


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """A pack with N trainable tokens, as a rank holds it: all of its T tokens, or a part of each sequence.

    Without context parallelism M = N: the rank computes the rows of all trainable tokens. With it, every row is
    computed by one rank of those that share the pack.
    """

    samples: tuple[TrainSample, ...]
    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[1, T]"""
    sequences: PackedSequences
    rows: torch.Tensor
    """[M]: the position among this rank's tokens whose logits predict a trainable token, sample by sample."""
    targets: torch.Tensor
    """[M]: that token."""
    own_rows: torch.Tensor
    """[M]: which of the N rows they are, ascending."""
    sample_of_row: torch.Tensor
    """[N]: the index in `samples`."""
    routed_experts: torch.Tensor | None = None
    """[T, layers x experts per token] int16: what the engine chose, -1 where no record is. None: nothing to replay."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.sample_of_row)

    @property
    def sharing(self) -> Sharing:
        """What is computed of the samples, all ranks that share them taken together."""
        return self.sequences.sharing or Sharing.none([len(sample) for sample in self.samples])


def predicting_rows(sampled: np.ndarray) -> np.ndarray:
    """Where the trainable tokens are predicted: token t by the logits at t - 1. The one shift that there is."""
    return np.flatnonzero(sampled) - 1


def make_packed_batch(
    samples: Sequence[TrainSample],
    *,
    device: torch.device,
    multiple: int = 1,
    part: ContextSlice | None = None,
) -> PackedBatch:
    """Lay samples side by side; the pack is filled up to a multiple of `multiple` tokens with a sequence nobody reads.

    No samples make a pack of `multiple` such tokens.

    Args:
        part: what this rank holds of each sequence. Sequences are padded at their ends, so that they divide evenly, and
            `multiple` must be a multiple of what they are padded to.
    """
    part = part or ContextSlice()
    whole = _lay_side_by_side(samples, multiple=multiple, sequence_multiple=part.sequence_multiple)
    held = part.positions(whole.lengths).numpy()
    place = np.full(len(whole.token_ids), -1)
    place[held] = np.arange(len(held))
    own_rows = np.flatnonzero(place[whole.rows] >= 0)
    rows = whole.rows[own_rows]
    return PackedBatch(
        samples=tuple(samples),
        input_ids=torch.from_numpy(whole.token_ids[held])[None].to(device),
        position_ids=torch.from_numpy(whole.positions[held])[None].to(device),
        sequences=pack_lengths(whole.lengths, device, part),
        rows=torch.from_numpy(place[rows]).to(device),
        targets=torch.from_numpy(whole.token_ids[rows + 1]).to(device),
        own_rows=torch.from_numpy(own_rows).to(device),
        sample_of_row=torch.from_numpy(whole.sample_of_row).to(device),
        routed_experts=_lay_routing(samples, whole.lengths, held, device),
    )


def _lay_routing(
    samples: Sequence[TrainSample], lengths: Sequence[int], held: npt.NDArray[np.int64], device: torch.device
) -> torch.Tensor | None:
    """The samples' routing at the places of a pack that this rank holds; their lengths there may be padded."""
    widths = {sample.routed_experts.shape[1] for sample in samples if sample.routed_experts is not None}
    if not widths:
        return None
    (width,) = widths
    whole = np.full((sum(lengths), width), -1, dtype=np.int16)
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        if sample.routed_experts is not None:
            whole[start : start + len(sample)] = sample.routed_experts
        start += length
    return torch.from_numpy(whole[held]).to(device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _WholePack:
    lengths: list[int]
    """Of its sequences, padding included."""
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    sample_of_row: npt.NDArray[np.int64]


def _lay_side_by_side(samples: Sequence[TrainSample], *, multiple: int, sequence_multiple: int) -> _WholePack:
    assert multiple % sequence_multiple == 0, (multiple, sequence_multiple)
    lengths = [len(sample) + -len(sample) % sequence_multiple for sample in samples]
    num_filling = -sum(lengths) % multiple if lengths else multiple
    starts = np.cumsum([0, *lengths])[: len(samples)]
    if num_filling:
        lengths = [*lengths, num_filling]
    token_ids = np.zeros(sum(lengths), dtype=np.int64)
    for sample, start in zip(samples, starts, strict=True):
        token_ids[start : start + len(sample)] = sample.token_ids
    rows = [predicting_rows(sample.sampled) + start for sample, start in zip(samples, starts, strict=True)]
    return _WholePack(
        lengths=lengths,
        token_ids=token_ids,
        positions=np.concatenate([np.arange(length) for length in lengths]),
        rows=np.concatenate([np.zeros(0, dtype=np.int64), *rows]),
        sample_of_row=np.repeat(np.arange(len(samples)), [len(r) for r in rows]),
    )


def gather_rows(batch: PackedBatch, columns: Sequence[np.ndarray]) -> torch.Tensor:
    """One column of each sample [T] -> its values at the trainable tokens, [N], float32."""
    parts = [column[sample.sampled] for sample, column in zip(batch.samples, columns, strict=True)]
    values = np.concatenate([np.zeros(0, dtype=np.float32), *parts]).astype(np.float32)
    return torch.from_numpy(values).to(batch.sample_of_row.device)


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
