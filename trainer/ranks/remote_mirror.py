"""A host's copy of the weights, where the host is another one than rank 0's: a Ray actor there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polyturn.trainer.weight_sync import WeightSyncError
from polyturn.trainer.weight_sync.delta import Patch
from polyturn.trainer.weight_sync.mirror import Mirror


class RemoteMirror:
    """The mirror of a host of the cluster, by its address."""

    def __init__(self, host: str, directory: Path, files: Mapping[str, bytes]) -> None:
        """Start it.

        Raises:
            WeightSyncError: no node of the cluster has that address.
        """
        node = next(
            (node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] == host), None
        )
        if node is None:
            raise WeightSyncError(
                f"weight_sync.kind delta keeps a copy of the weights on every host of engines, and {host} is no node "
                "of the Ray cluster: have engines elsewhere updated by weight_sync.kind broadcast or disk"
            )
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        self._actor = (
            ray.remote(Mirror).options(num_cpus=0, scheduling_strategy=on_node).remote(directory, files)
        )
        self.version: int | None = None

    def begin(self, base: int | None) -> None:
        self.version = None
        ray.get(self._actor.begin.remote(base))

    def take(self, patches: Sequence[Patch]) -> None:
        ray.get(self._actor.take.remote(patches))

    def finish(self, version: int) -> str:
        path: str = ray.get(self._actor.finish.remote(version))
        self.version = version
        return path
