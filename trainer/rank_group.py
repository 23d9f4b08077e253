"""The ranks of one model as Ray actors, seen from the driver."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.rollout.engines.placement import assigned_gpus, gpu_environment

START_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 20.0


def see_own_gpu(device: str) -> None:
    """Hide the GPUs of others from this actor, where Ray was told not to, before CUDA is first used."""
    if device == "cuda":
        os.environ.update(gpu_environment(assigned_gpus(ray.get_gpu_ids(), 1)))


class Call:
    """A call under way on all ranks."""

    def __init__(self, references: Sequence[Any], *, answering: Sequence[int]) -> None:
        """`answering`: the ranks whose results are asked for."""
        self._references = list(references)
        self._answering = answering

    def results(self) -> list[Any]:
        """Wait for all ranks; what the answering ones gave.

        Raises what the first of them to fail raised, and does not wait for the others: they may wait for it.
        """
        pending = list(self._references)
        found: dict[Any, Any] = {}
        while pending:
            done, pending = ray.wait(pending)
            found.update(zip(done, ray.get(done), strict=True))
        return [found[self._references[rank]] for rank in self._answering]


class RankGroup:
    """Starts one actor per rank of a layout, and calls them together."""

    def __init__(
        self, actor_class: type, *, config: RunConfig, model_path: Path, parallel: ParallelConfig
    ) -> None:
        self._parallel = parallel
        on_gpu = config.trainer.device == "cuda"
        bundle = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
        self._placement: PlacementGroup = placement_group([bundle] * parallel.world_size, strategy="PACK")
        ray.get(self._placement.ready(), timeout=START_TIMEOUT_S)
        threads = str(config.trainer.threads_per_rank)
        actor = ray.remote(actor_class)
        self._ranks = [
            actor.options(
                num_cpus=1,
                num_gpus=1 if on_gpu else 0,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=rank
                ),
            ).remote(config=config, model_path=str(model_path), rank=rank)
            for rank in range(parallel.world_size)
        ]

    def start_build(self) -> list[Any]:
        """Begin to load the model on all ranks; the references to wait for."""
        address, port = ray.get(self._ranks[0].rendezvous.remote(), timeout=START_TIMEOUT_S)
        return [rank.build.remote(address, port) for rank in self._ranks]

    def begin_checkpoint(self, directory: Path) -> None:
        """Copy the state on all ranks; they write it while the run goes on."""
        directory.mkdir(parents=True, exist_ok=True)
        self._on_all("begin_checkpoint", str(directory))

    def checkpoint_written(self) -> bool:
        """Whether `finish_checkpoint` would not have to wait for a disk."""
        return all(self._on_all("checkpoint_written"))

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that was begun.

        Raises:
            CheckpointError: a rank could not write it.
        """
        self._on_all("finish_checkpoint")

    def find_checkpoint_faults(self, directory: Path) -> list[str]:
        """What is wrong with the files of a checkpoint, which the ranks read among themselves."""
        return [
            fault for faults in self._on_all("find_checkpoint_faults", str(directory)) for fault in faults
        ]

    def load_checkpoint(self, directory: Path) -> None:
        self._on_all("load_checkpoint", str(directory))

    def close(self) -> None:
        """End the actors, also those that wait for one that has failed."""
        calls = [rank.close.remote() for rank in self._ranks]
        try:
            closed, _busy = ray.wait(calls, num_returns=len(calls), timeout=CLOSE_TIMEOUT_S)
            ray.get(closed)
        finally:
            for rank in self._ranks:
                ray.kill(rank)
            remove_placement_group(self._placement)

    def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        return Call(calls, answering=range(len(calls))).results()

    def _start_on_shards(self, method: str, shards: Sequence[Any]) -> Call:
        """Call with one share per data-parallel copy; the first rank of each answers.

        All ranks that share one copy of the model get the same share and find the same, so that of the others nothing
        but their end, or their failure, leaves the rank.
        """
        assert len(shards) == self._parallel.data, "one share per data-parallel rank"
        references = [ray.put(shard) for shard in shards]
        answering = self._parallel.first_ranks()
        calls = []
        for rank, actor in enumerate(self._ranks):
            share = references[self._parallel.place(rank).data]
            call = getattr(actor, method).remote if rank in answering else partial(_silently, actor, method)
            calls.append(call(share))
        return Call(calls, answering=answering)

    def _on_shards(self, method: str, shards: Sequence[Any]) -> list[Any]:
        """The same, waited for."""
        return self._start_on_shards(method, shards).results()


def _silently(actor: Any, method: str, share: Any) -> Any:
    """Call an actor's method there, and let its result stay behind."""
    return actor.__ray_call__.remote(_call, method, share)


def _call(rank: Any, method: str, share: Any) -> None:
    getattr(rank, method)(share)
