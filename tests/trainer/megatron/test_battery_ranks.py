"""Every registered loss under every reduction, over real process groups: the sum over ranks is the single process's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks_pool import RankContext, RankPool

from polyturn.trainer.algorithms.reductions import GlobalCounts, weighted_sum
from polyturn.trainer.algorithms.registry import POLICY_LOSSES, REDUCERS
from polyturn.trainer.battery import Case, cases
from polyturn.trainer.battery.rows import Row, count, random_rows, to_batch

NUM_FEATURES = 3
Results = dict[str, torch.Tensor]


def pairs() -> Iterator[tuple[Case, Case]]:
    """Every loss with every reduction."""
    yield from itertools.product(cases(POLICY_LOSSES), cases(REDUCERS))


def with_features(rows: Sequence[Row]) -> list[Row]:
    """Rows whose logprobs are linear in weights that all ranks share."""
    generator = torch.Generator().manual_seed(7)
    return [
        row.having(features=torch.randn(len(row), NUM_FEATURES, generator=generator, dtype=torch.float64))
        for row in rows
    ]


def update(
    rows: Sequence[Row], counts: GlobalCounts, *, slice_group: dist.ProcessGroup | None = None
) -> Results:
    """By loss and reduction: the loss of these rows, and its gradient by the shared weights, in one vector.

    With a group of context-parallel ranks, a rank computes the logprobs of its slice of the tokens only, and gets
    those of the others without gradient.
    """
    batch = to_batch(rows, counts)
    nothing = torch.zeros(0, NUM_FEATURES, dtype=torch.float64)
    features = torch.cat([row.columns["features"] for row in rows]) if rows else nothing
    results = {}
    for loss, reducer in pairs():
        weights = torch.zeros(NUM_FEATURES, dtype=torch.float64, requires_grad=True)
        logprobs = batch.logprobs.detach() + features @ weights
        if slice_group is not None:
            logprobs = gather(logprobs, slice_group)
        moved = replace(batch, logprobs=logprobs)
        total = weighted_sum(loss.function(moved).values, reducer.function(moved.mask, moved, counts))
        (gradient,) = (
            torch.autograd.grad(total, weights) if total.requires_grad else (torch.zeros_like(weights),)
        )
        alone = slice_group is None or dist.get_rank(slice_group) == 0
        results[f"{loss.name}/{reducer.name}"] = torch.cat([total.detach()[None] * alone, gradient])
    return results


def gather(logprobs: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
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


def update_on_rank(context: RankContext, num_slices: int) -> Results:
    """The sums over all ranks, whose shares of the samples have very different sizes."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{context.master_address}:{context.master_port}",
        rank=context.rank,
        world_size=context.world_size,
    )
    starts = range(0, context.world_size, num_slices)
    groups = [dist.new_group(list(range(start, start + num_slices))) for start in starts]
    rows = with_features(random_rows(1))
    share, num_shares = context.rank // num_slices, context.world_size // num_slices
    bounds = [0, *range(1, num_shares), len(rows)]
    mine = rows[bounds[share] : bounds[share + 1]]
    results = update(mine, count(rows), slice_group=groups[share] if num_slices > 1 else None)
    total = torch.stack(list(results.values()))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return dict(zip(results, total, strict=True))


@pytest.mark.stack
@pytest.mark.catalogue("B14", "B18", "B19")
@pytest.mark.parametrize(("num_ranks", "num_slices"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_ranks_add_up_to_one_process(rank_pool: RankPool, num_ranks: int, num_slices: int) -> None:
    rows = with_features(random_rows(1))
    expected = update(rows, count(rows))
    for results in rank_pool.run(num_ranks, update_on_rank, num_slices):
        assert results.keys() == expected.keys()
        for name, found in results.items():
            torch.testing.assert_close(
                found, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert all(bool(total[1:].any()) for total in expected.values())
