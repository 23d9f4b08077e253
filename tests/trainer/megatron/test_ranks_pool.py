"""The pool itself: ranks run together, each job in processes of its own, and failures come back as they were."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.ranks_pool import RankContext, RankFailure

pytestmark = pytest.mark.stack


def sum_of_ranks(context: RankContext, parallel: ParallelConfig, offset: int) -> tuple[int, float, int]:
    with context.joined(parallel):
        total = torch.tensor(float(context.rank + offset))
        dist.all_reduce(total)
        return os.getpid(), total.item(), torch.get_num_threads()


def fail_on_one(context: RankContext, parallel: ParallelConfig) -> None:
    with context.joined(parallel):
        if context.rank == 1:
            raise KeyError("this rank's own trouble")
        dist.barrier()


def imports(context: RankContext, package: str) -> bool:
    return package in sys.modules


def die_on_one(context: RankContext) -> None:
    if context.rank == 1:
        os._exit(3)
    time.sleep(60)


def test_ranks_meet_and_leave_nothing_behind(rank_pool):
    first = rank_pool.run(2, sum_of_ranks, ParallelConfig(tensor=2), 0)
    second = rank_pool.run(4, sum_of_ranks, ParallelConfig(data=4), 1)
    assert [total for _, total, _ in first] == [1.0] * 2
    assert [total for _, total, _ in second] == [10.0] * 4
    pids = [pid for pid, _, _ in first + second]
    assert len(set(pids)) == 6 and os.getpid() not in pids
    assert {threads for _, _, threads in first + second} == {1}


def test_what_megatron_would_import_for_its_inference_is_left_out(rank_pool):
    assert rank_pool.run(1, imports, "megatron.core.inference_params") == [True]
    assert rank_pool.run(1, imports, "wandb") == [False]


def test_a_rank_that_raises_is_reported_with_its_traceback(rank_pool):
    with pytest.raises(RankFailure, match="this rank's own trouble") as failure:
        rank_pool.run(2, fail_on_one, ParallelConfig(data=2))
    assert "in fail_on_one" in str(failure.value)
    assert rank_pool.run(1, sum_of_ranks, ParallelConfig(), 5)[0][1] == 5.0, "and the pool goes on"


def test_a_rank_that_dies_is_reported(rank_pool):
    with pytest.raises(RankFailure, match="rank 0: did not end in time\nrank 1: the process died"):
        rank_pool.run(2, die_on_one)
