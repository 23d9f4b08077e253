"""What a rank does in the tests of weights that go from trainers of several ranks to real engines."""

from __future__ import annotations

from pathlib import Path

from benchmarks.weight_layouts import send
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.weight_sync import SyncReport
from tests.support.megatron.ranks_pool import RankContext


def publish(
    context: RankContext, path: Path, layout: ParallelConfig, url: str, tensor_parallel: int, version: int
) -> SyncReport | None:
    """Load a model in a layout, and broadcast it to an engine of so many ranks; what rank 0 reports."""
    from tests.support.megatron.policies import make_policy

    policy = make_policy(path, parallel=layout, place=context.place)
    return send(policy, path, url, tensor_parallel=tensor_parallel, version=version)
