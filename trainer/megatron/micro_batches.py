"""A rank's samples as micro-batches, and what was computed of them back as columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from polyturn.configs.schema.trainer import ParallelConfig, SharedPrefix
from polyturn.trainer.data.balance import pack, pack_by_prefix, split_packs
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.attention import ContextSlice
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.packing import PackedBatch, make_packed_batch, make_tree_batch, scatter_rows


def make_micro_batches(
    samples: Sequence[TrainSample],
    *,
    max_tokens: int,
    parallel: ParallelConfig,
    device: torch.device,
    shared_prefix: SharedPrefix = "off",
) -> list[PackedBatch]:
    """This rank's micro-batches, as many as every other rank's. Collective.

    Args:
        max_tokens: of a micro-batch on one rank; the ranks that share sequences hold so many each.
        shared_prefix: "group" puts samples with a common prefix together, "tree" computes it once for all of them.
    """
    gather = pack if shared_prefix == "off" else pack_by_prefix
    packs = gather(samples, max_tokens * parallel.context)
    most = torch.tensor(len(packs), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    multiple = parallel.micro_batch_multiple()
    num_packs = -(-max(int(most), 1) // multiple) * multiple
    place = parallel.place(dist.get_rank())
    if shared_prefix == "tree":
        return [
            make_tree_batch(group, device=device, multiple=parallel.pack_multiple())
            for group in split_packs(packs, num_packs)
        ]
    return [
        make_packed_batch(
            group,
            device=device,
            multiple=parallel.pack_multiple(),
            part=ContextSlice(size=parallel.context, rank=place.context),
        )
        for group in split_packs(packs, num_packs)
    ]


def finite_columns(
    engine: Engine,
    samples: Sequence[TrainSample],
    batches: Sequence[PackedBatch],
    values: Sequence[torch.Tensor],
    *,
    what: str,
) -> list[npt.NDArray[np.float32]]:
    """A column [T] for each sample, in their order, from the values [N] of each micro-batch.

    Raises:
        FloatingPointError: one of them is not finite; names the sample. All ranks raise it.
    """
    columns: dict[int, npt.NDArray[np.float32]] = {}
    for batch, found in zip(batches, values, strict=True):
        for sample, column in zip(batch.samples, scatter_rows(batch, found), strict=True):
            columns[id(sample)] = column
    engine.raise_together(
        [
            f"sample {sample.sample_id}: a {what} is not finite"
            for sample in samples
            if not np.isfinite(columns[id(sample)]).all()
        ]
    )
    return [columns[id(sample)] for sample in samples]
