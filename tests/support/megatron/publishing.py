"""What a rank does in the tests of weights that go from trainers of several ranks to real engines."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.trainer.weight_sync import SyncReport
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from tests.support.megatron.ranks_pool import RankContext


def publish(
    context: RankContext, path: Path, layout: ParallelConfig, url: str, tensor_parallel: int, version: int
) -> SyncReport | None:
    """Load a model in a layout, and broadcast it to an engine of so many ranks; what rank 0 reports."""
    from tests.support.megatron.policies import make_policy

    policy = make_policy(path, parallel=layout, place=context.place)
    tensors = policy.named_hf_tensors()
    try:
        if context.rank:
            for _ in tensors:
                pass
            return None
        hf_config = json.loads((path / "config.json").read_text())
        publisher = BroadcastPublisher(
            tensor_parallel=tensor_parallel,
            address="127.0.0.1",
            backend="gloo",
            bucket_bytes=1 << 16,
            timeout_s=60,
            hung_after_s=60,
            new_checksums=partial(
                EngineChecksums, EngineLayout.of_config(hf_config), tensor_parallel=tensor_parallel
            ),
        )
        publisher.set_engines([url])
        publisher.prepare(tensors, version=version)
        report = publisher.activate()
        publisher.close()
        return report
    finally:
        policy.close()
