"""Losses and reductions over real process groups: what the ranks add up to is what one process computes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from polyturn.rollout.engines.placement import free_port
from polyturn.trainer.algorithms.protocols import PolicyLoss, Reducer
from polyturn.trainer.algorithms.reductions import weighted_sum
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.battery.invariances import require_equal
from polyturn.trainer.battery.rows import Row, count, random_rows, to_batch

NUM_FEATURES = 3
TOLERANCE = 1e-9
Sums = dict[str, torch.Tensor]
"""By loss and reduction: the loss, then its gradient by the shared weights, [1 + NUM_FEATURES]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How many processes share an update."""

    num_ranks: int
    num_slices: int = 1
    """Neighbouring ranks that share their samples, each with a slice of the tokens, as under context parallelism."""


LAYOUTS = (
    Layout(num_ranks=2),
    Layout(num_ranks=4),
    Layout(num_ranks=2, num_slices=2),
    Layout(num_ranks=4, num_slices=2),
)
"""Two and four data-parallel ranks, two slices, and two by two."""


def rows_with_features(seed: int) -> list[Row]:
    """Rows whose logprobs will be linear in weights that all ranks share."""
    generator = torch.Generator().manual_seed(seed)
    return [
        row.having(features=torch.randn(len(row), NUM_FEATURES, generator=generator, dtype=torch.float64))
        for row in random_rows(seed)
    ]


def sums_of(
    rows: Sequence[Row],
    counts: GlobalCounts,
    losses: Mapping[str, PolicyLoss],
    reducers: Mapping[str, Reducer],
    *,
    slice_group: dist.ProcessGroup | None = None,
) -> Sums:
    """Every loss under every reduction, over these rows of the update that `counts` describes.

    Args:
        slice_group: the ranks that share these rows. A rank computes the logprobs of its slice of the tokens and gets
            those of the others without gradient; the loss itself counts on the first of them only.
    """
    batch = to_batch(rows, counts)
    nothing = torch.zeros(0, NUM_FEATURES, dtype=torch.float64)
    features = torch.cat([row.columns["features"] for row in rows]) if rows else nothing
    counted = slice_group is None or dist.get_rank(slice_group) == 0
    sums = {}
    for (name, loss), (reduction, reducer) in itertools.product(losses.items(), reducers.items()):
        weights = torch.zeros(NUM_FEATURES, dtype=torch.float64, requires_grad=True)
        logprobs = batch.logprobs.detach() + features @ weights
        if slice_group is not None:
            logprobs = _gather_slices(logprobs, slice_group)
        moved = replace(batch, logprobs=logprobs)
        total = weighted_sum(loss(moved).values, reducer(moved.mask, moved, counts))
        gradient = torch.zeros_like(weights)
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, weights)
        sums[f"{name} under {reduction}"] = torch.cat([total.detach()[None] * counted, gradient])
    return sums


def sums_on_rank(
    rank: int,
    layout: Layout,
    address: str,
    losses: Mapping[str, PolicyLoss],
    reducers: Mapping[str, Reducer],
    *,
    seed: int = 0,
) -> Sums:
    """As one rank of a gloo process group that meets at `address`: the sums over all ranks.

    Ranks have samples of very different sizes, and the last of four has most of them.
    """
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=layout.num_ranks)
    try:
        starts = range(0, layout.num_ranks, layout.num_slices)
        groups = [dist.new_group(list(range(start, start + layout.num_slices))) for start in starts]
        rows = rows_with_features(seed)
        share, num_shares = rank // layout.num_slices, layout.num_ranks // layout.num_slices
        bounds = [0, *range(1, num_shares), len(rows)]
        mine = rows[bounds[share] : bounds[share + 1]]
        slice_group = groups[share] if layout.num_slices > 1 else None
        sums = sums_of(mine, count(rows), losses, reducers, slice_group=slice_group)
        total = torch.stack(list(sums.values()))
        dist.all_reduce(total)
        return dict(zip(sums, total, strict=True))
    finally:
        dist.destroy_process_group()


def require_sums(
    found: Sums, losses: Mapping[str, PolicyLoss], reducers: Mapping[str, Reducer], seed: int
) -> None:
    """Raise `BatteryFailure` unless these are the sums of a single process."""
    rows = rows_with_features(seed)
    for name, expected in sums_of(rows, count(rows), losses, reducers).items():
        require_equal(found[name], expected, f"{name} over ranks", tolerance=TOLERANCE)


def check_over_ranks(
    losses: Mapping[str, PolicyLoss],
    reducers: Mapping[str, Reducer],
    layout: Layout = LAYOUTS[0],
    *,
    seed: int = 0,
) -> None:
    """Start the processes of a layout and compare what they add up to with a single process's.

    The functions must be such as pickle can name: at the top level of a module, or `functools.partial` of these.

    Raises:
        BatteryFailure: they differ.
        torch.multiprocessing.ProcessRaisedException: a process failed.
    """
    address = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    context = torch.multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    torch.multiprocessing.spawn(
        _put_sums, args=(results, layout, address, losses, reducers, seed), nprocs=layout.num_ranks
    )
    for _ in range(layout.num_ranks):
        found = {name: torch.tensor(values, dtype=torch.float64) for name, values in results.get().items()}
        require_sums(found, losses, reducers, seed)


def _put_sums(
    rank: int,
    results: Any,
    layout: Layout,
    address: str,
    losses: Mapping[str, PolicyLoss],
    reducers: Mapping[str, Reducer],
    seed: int,
) -> None:
    torch.set_num_threads(1)
    sums = sums_on_rank(rank, layout, address, losses, reducers, seed=seed)
    results.put({name: total.tolist() for name, total in sums.items()})


def _gather_slices(logprobs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's slice with its gradient, between the others' as they sent them."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    width = -(-len(logprobs) // size)
    own = logprobs[rank * width : (rank + 1) * width]
    sent = torch.zeros(width, dtype=logprobs.dtype)
    sent[: len(own)] = own.detach()
    received = [torch.zeros_like(sent) for _ in range(size)]
    dist.all_gather(received, sent, group=group)
    before, after = torch.cat([*received[:rank], sent[:0]]), torch.cat([*received[rank + 1 :], sent[:0]])
    return torch.cat([before, own, after])[: len(logprobs)]
