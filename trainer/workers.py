"""The Ray actors of a run: one per trainer rank, one per engine.

Actors die with the driver: Ray ends the workers of a job whose driver is gone, and an engine's server ends with the
actor that started it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import ray
from ray._private import ray_constants
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema import BroadcastSync, RunConfig
from polyturn.rollout.engines.checksum import EngineChecksums
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.ports import free_port
from polyturn.rollout.engines.server import SGLangServer
from polyturn.trainer.batch import TrainSample
from polyturn.trainer.updates import ScoredColumns, UpdateReport, UpdateShare, run_updates, score_samples
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher

ADAPTER_NAME = "adapter"
START_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 20.0


def start_ray(config: RunConfig) -> None:
    """Join the cluster that the config names, or start a private one on this machine's loopback."""
    if config.cluster.address is not None:
        ray.init(address=config.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return
    # Ray takes its loopback mode, in which nothing listens beyond this machine, for Windows and macOS alone. The
    # constant is for this process, which has read the variable already; the variable is for the processes of Ray.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # The ranks are counted as CPUs; engines take turns with them, so they ask for none.
    num_cpus = max(config.trainer.parallel.world_size, 1)
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )


class TrainerRank:
    """One rank of the trainer, as a Ray actor."""

    def __init__(self, *, config: RunConfig, model_path: str, rank: int) -> None:
        self._config = config
        self._model_path = Path(model_path)
        self._rank = rank
        self._publisher: WeightPublisher | None = None

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port of this rank's host."""
        address = ray.util.get_node_ip_address()
        return address, free_port(address)

    def build(self, address: str, port: int) -> None:
        """Join the other ranks and load the model."""
        from polyturn.trainer.megatron.policy import MegatronPolicy

        trainer, reference = self._config.trainer, self._config.model.reference_path
        self._policy = MegatronPolicy(
            self._model_path,
            dtype=self._config.model.dtype,
            device=trainer.device,
            parallel=trainer.parallel,
            optimizer=trainer.optimizer,
            megatron=self._config.megatron,
            seed=self._config.seed,
            rank=self._rank,
            world_size=trainer.parallel.world_size,
            master_address=address,
            master_port=port,
            max_tokens_per_gpu=trainer.max_tokens_per_gpu,
            keep_reference=trainer.algorithm.needs_reference,
            reference_path=None if reference is None else resolve_model_path(reference),
            lora=trainer.lora,
        )

    def connect(self, engine_urls: Sequence[str], weights_directory: str) -> None:
        """Prepare to publish weights to the engines. Only rank 0 does anything."""
        if self._rank != 0:
            return
        sync = self._config.weight_sync
        engines = [EngineControl(url) for url in engine_urls]
        hf_config = orjson.loads((self._model_path / "config.json").read_bytes())
        new_checksums = partial(
            EngineChecksums,
            tied_embeddings=bool(hf_config.get("tie_word_embeddings")),
            device=self._config.engines.device,
            tensor_parallel=self._config.engines.tensor_parallel,
            num_kv_heads=hf_config.get("num_key_value_heads"),
        )
        if isinstance(sync, BroadcastSync):
            from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher

            address, port = self.rendezvous()
            self._publisher = BroadcastPublisher(
                engines=engines,
                tensor_parallel=self._config.engines.tensor_parallel,
                address=address,
                port=port,
                backend="gloo" if self._config.trainer.device == "cpu" else "nccl",
                bucket_bytes=sync.bucket_bytes,
                timeout_s=sync.timeout_s,
                new_checksums=new_checksums,
            )
        else:
            from polyturn.trainer.weight_sync.disk import DiskPublisher

            directory = sync.directory or Path(weights_directory)
            self._publisher = DiskPublisher(
                engines=engines, model_path=self._model_path, directory=directory, new_checksums=new_checksums
            )

    def publish(self, version: int) -> SyncReport | None:
        """Send the weights to the engines. Every rank takes part; rank 0 reports."""
        tensors = self._policy.named_hf_tensors()
        if self._publisher is not None:
            return self._publisher.publish(tensors, version=version)
        for _ in tensors:
            continue
        return None

    def score(self, samples: Sequence[TrainSample]) -> dict[str, ScoredColumns]:
        """The logprobs of this rank's samples under the weights as they are."""
        return score_samples(self._policy, samples, config=self._config)

    def update(self, shares: Sequence[UpdateShare]) -> UpdateReport:
        """Train on this rank's share of a step."""
        return run_updates(self._policy, shares, config=self._config)

    def begin_checkpoint(self, directory: str) -> None:
        self._policy.begin_checkpoint(Path(directory))

    def checkpoint_written(self) -> bool:
        return self._policy.checkpoint_written()

    def finish_checkpoint(self) -> None:
        self._policy.finish_checkpoint()

    def find_checkpoint_faults(self, directory: str) -> list[str]:
        return self._policy.find_checkpoint_faults(Path(directory))

    def load_checkpoint(self, directory: str) -> None:
        self._policy.load_checkpoint(Path(directory))

    def save_hf(self, directory: str) -> None:
        """Write the policy as a Hugging Face directory, and its adapters, if it has any, beside it."""
        self._policy.save_hf(Path(directory))
        if self._policy.lora is not None:
            self._policy.save_adapter(Path(directory).with_name(ADAPTER_NAME))

    def close(self) -> None:
        """Leave the engines and the other ranks."""
        if self._publisher is not None:
            self._publisher.close()
        self._policy.close()


class EngineHost:
    """One SGLang server, started on the host where Ray places this actor."""

    def __init__(self, *, config: RunConfig, model_path: str, log_path: str, port: int, index: int) -> None:
        self._server = SGLangServer(
            config=config.engines,
            model_path=Path(model_path),
            sglang=config.sglang,
            dtype=config.model.dtype,
            seeded=config.rollout.sampling.seeded,
            port=port,
            log_path=Path(log_path),
            index=index,
            random_seed=config.seed,
        )

    def start(self, timeout_s: float) -> str:
        """Start the server and wait until it is healthy; its URL."""
        self._server.start()
        self._server.wait_ready(timeout_s)
        return self._server.url

    def alive(self) -> bool:
        return self._server.alive()

    def stop(self) -> None:
        self._server.stop()


class TrainerGroup:
    """All ranks of the trainer, seen from the driver."""

    def __init__(self, config: RunConfig, *, model_path: Path) -> None:
        parallel = config.trainer.parallel
        self._tensor_parallel = parallel.tensor
        on_gpu = config.trainer.device == "cuda"
        bundle = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
        self._placement: PlacementGroup = placement_group([bundle] * parallel.world_size, strategy="PACK")
        ray.get(self._placement.ready(), timeout=START_TIMEOUT_S)
        threads = str(config.trainer.threads_per_rank)
        actor = ray.remote(TrainerRank)
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

    def connect(self, engine_urls: Sequence[str], weights_directory: Path) -> None:
        self._on_all("connect", list(engine_urls), str(weights_directory))

    def publish(self, version: int) -> SyncReport:
        """Send the weights to the engines."""
        reports = [report for report in self._on_all("publish", version) if report is not None]
        assert len(reports) == 1, "exactly rank 0 publishes"
        return reports[0]

    def score(self, shards: Sequence[Sequence[TrainSample]]) -> list[dict[str, ScoredColumns]]:
        """The logprobs of one share per data-parallel rank, under the weights as they are."""
        return self._on_shards("score", shards)

    def update(self, shards: Sequence[Sequence[UpdateShare]]) -> list[UpdateReport]:
        """Train on one share per data-parallel rank; the report of each."""
        return self._on_shards("update", shards)

    def _on_shards(self, method: str, shards: Sequence[Any]) -> list[Any]:
        """Call with one share per data-parallel rank; the results of one tensor rank of each."""
        assert len(shards) * self._tensor_parallel == len(self._ranks), "one share per data-parallel rank"
        references = [ray.put(shard) for shard in shards]
        # Megatron's default order: the tensor-parallel ranks of one data-parallel rank are neighbours.
        calls = [
            getattr(rank, method).remote(references[index // self._tensor_parallel])
            for index, rank in enumerate(self._ranks)
        ]
        return ray.get(calls)[:: self._tensor_parallel]

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

    def save_hf(self, directory: Path) -> None:
        self._on_all("save_hf", str(directory))

    def close(self) -> None:
        """Leave the engines and end the actors."""
        try:
            ray.get([rank.close.remote() for rank in self._ranks], timeout=CLOSE_TIMEOUT_S)
        finally:
            for rank in self._ranks:
                ray.kill(rank)
            remove_placement_group(self._placement)

    def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self._ranks])


class EngineGroup:
    """All SGLang servers of a run, each in an actor of its own."""

    def __init__(self, config: RunConfig, *, model_path: Path, logs: Path) -> None:
        engines = config.engines
        on_gpu = engines.device == "cuda"
        actor = ray.remote(EngineHost)
        self._config = config
        self._hosts = [
            actor.options(num_cpus=0, num_gpus=engines.tensor_parallel if on_gpu else 0).remote(
                config=config,
                model_path=str(model_path),
                log_path=str(logs / f"engine_{index}.log"),
                port=engines.port + index if engines.port else 0,
                index=index,
            )
            for index in range(engines.num_engines)
        ]

    def start(self) -> list[Any]:
        """Begin to start all servers; the references whose values are their URLs."""
        return [host.start.remote(self._config.engines.start_timeout_s) for host in self._hosts]

    def close(self) -> None:
        """End the servers and the actors. A server whose actor does not answer ends with the actor."""
        try:
            ray.get([host.stop.remote() for host in self._hosts], timeout=CLOSE_TIMEOUT_S)
        finally:
            for host in self._hosts:
                ray.kill(host)
