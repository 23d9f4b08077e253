"""The Ray actors of a run: one per trainer rank, one per engine.

Actors die with the driver: Ray ends the workers of a job whose driver is gone, and an engine's server ends with the
actor that started it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import ray
from ray._private import ray_constants

from polyturn.configs.addresses import bind_address
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import BroadcastSync, RunConfig
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.placement import assigned_gpus, free_port
from polyturn.rollout.engines.server import SGLangServer
from polyturn.trainer.batch import TrainSample
from polyturn.trainer.cluster import Node, check_cluster
from polyturn.trainer.critic_updates import in_warmup, with_critic_metrics, with_values
from polyturn.trainer.critic_workers import CHECKPOINT_NAME, CriticGroup, make_critic
from polyturn.trainer.failures import RunFailure
from polyturn.trainer.megatron.checkpoints.sources import initial_weights
from polyturn.trainer.rank_group import CLOSE_TIMEOUT_S, RankGroup, see_own_gpu
from polyturn.trainer.updates import (
    ScoredColumns,
    UpdateReport,
    UpdateShare,
    critic_report,
    run_updates,
    score_samples,
)
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher

if TYPE_CHECKING:
    from polyturn.trainer.megatron.fp8_directory import FP8Cast

ADAPTER_NAME = "adapter"


def start_ray(config: RunConfig, *, num_gpus: int | None = None) -> None:
    """Join the cluster that the config names, or start a private one on this machine's loopback.

    Args:
        num_gpus: of a private one; None: those that this process sees.

    Raises:
        ConfigError: the cluster has no room for the run.
    """
    if config.cluster.address is not None:
        try:
            ray.init(address=config.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunFailure(
                f"cluster.address: Ray at {config.cluster.address} cannot be joined: {str(error).splitlines()[0]}"
            ) from error
        check_cluster(config, [Node.of(entry) for entry in ray.nodes() if entry["Alive"]])
        return
    # Ray takes its loopback mode, in which nothing listens beyond this machine, for Windows and macOS alone. The
    # constant is for this process, which has read the variable already; the variable is for the processes of Ray.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    # The ranks are counted as CPUs; engines take turns with them, so they ask for none.
    num_cpus = config.trainer.num_ranks
    ray.init(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
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
        self._cast: FP8Cast | None = None

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port of this rank's host."""
        address = bind_address(ray.util.get_node_ip_address())
        return address, free_port(address)

    def build(self, address: str, port: int) -> None:
        """Join the other ranks and load the model."""
        see_own_gpu(self._config.trainer.device)
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
            total_updates=trainer.total_updates,
            keep_reference=trainer.algorithm.needs_reference,
            reference_path=None if reference is None else resolve_model_path(reference),
            initial_path=initial_weights(self._config),
            load_optimizer=self._config.checkpoint.load_optimizer,
            lora=trainer.lora,
            routing_replay=self._config.engines.routing_replay,
            shared_prefix=trainer.shared_prefix,
        )
        self._critic = None
        if trainer.uses_critic and not trainer.critic_has_ranks:
            self._critic = make_critic(self._config, model_path=self._model_path, parallel=trainer.parallel)
            self._policy.keep_in_checkpoints("critic", self._critic.engine)

    def connect(self, engine_urls: Sequence[str], weights_directory: str, engine_model: str) -> None:
        """Prepare to publish weights to the engines. Only rank 0 does anything."""
        if self._rank != 0:
            return
        from polyturn.rollout.engines.checksums import EngineChecksums

        sync = self._config.weight_sync
        if sync.dtype == "fp8_block":
            from polyturn.trainer.megatron.fp8_directory import FP8Cast

            self._cast = FP8Cast(self._model_path)
        engines = [EngineControl(url) for url in engine_urls]
        hf_config = orjson.loads((self._model_path / "config.json").read_bytes())
        new_checksums = partial(
            EngineChecksums,
            tied_embeddings=bool(hf_config.get("tie_word_embeddings")),
            device=self._config.engines.device,
            tensor_parallel=self._config.engines.tensor_parallel,
            num_kv_heads=hf_config.get("num_key_value_heads"),
            num_experts=hf_config.get("num_experts") or hf_config.get("n_routed_experts") or 0,
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
                engines=engines,
                model_path=self._model_path if sync.dtype == "same" else Path(engine_model),
                directory=directory,
                new_checksums=new_checksums,
            )

    def publish(self, version: int) -> SyncReport | None:
        """Send the weights to the engines. Every rank takes part; rank 0 reports."""
        tensors, report = self._policy.named_hf_tensors(), None
        if self._publisher is not None:
            report = self._publisher.publish(self._cast(tensors) if self._cast else tensors, version=version)
        else:
            for _ in tensors:
                continue
        correlation = self._policy.adapter_correlation()
        return None if report is None else replace(report, adapter_correlation=correlation)

    def score(self, samples: Sequence[TrainSample]) -> dict[str, ScoredColumns]:
        """The logprobs of this rank's samples under the weights as they are."""
        return score_samples(self._policy, samples, config=self._config, critic=self._critic)

    def update(self, shares: Sequence[UpdateShare]) -> UpdateReport:
        """Train on this rank's share of a step."""
        return run_updates(self._policy, shares, config=self._config, critic=self._critic)

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
        # A rank whose model could not be built has nothing to leave.
        if hasattr(self, "_policy"):
            self._policy.close()


class EngineHost:
    """One SGLang server, started on the host where Ray places this actor."""

    def __init__(self, *, config: RunConfig, model_path: str, log_path: str, port: int, index: int) -> None:
        self._config = config
        self._model_path = Path(model_path)
        self._log_path = Path(log_path)
        self._port = port
        self._index = index
        self._server: SGLangServer | None = None

    def start(self, timeout_s: float) -> str:
        """Start the server and wait until it is healthy; its URL, as all nodes of the cluster may use it.

        Raises:
            ValueError: it cannot have its port, or its GPUs.
            EngineError: it ended, or was not healthy in time.
        """
        config, engines = self._config, self._config.engines
        on_gpu = engines.device == "cuda"
        self._server = SGLangServer(
            config=engines,
            model_path=self._model_path,
            sglang=config.sglang,
            dtype=config.model.dtype,
            seeded=config.rollout.sampling.seeded,
            gpus=assigned_gpus(ray.get_gpu_ids(), engines.tensor_parallel) if on_gpu else (),
            port=self._port,
            log_path=self._log_path,
            index=self._index,
            random_seed=config.seed,
            own_address=bind_address(ray.util.get_node_ip_address()),
        )
        self._server.start()
        self._server.wait_ready(timeout_s)
        return self._server.url

    def alive(self) -> bool:
        return self._server is not None and self._server.alive()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


class TrainerGroup(RankGroup):
    """All ranks of the trainer, and those of a critic that has its own."""

    def __init__(self, config: RunConfig, *, model_path: Path) -> None:
        super().__init__(TrainerRank, config=config, model_path=model_path, parallel=config.trainer.parallel)
        self._config = config
        self._critic: CriticGroup | None = None
        if config.trainer.critic_has_ranks:
            self._critic = CriticGroup(config, model_path=model_path)

    def start_build(self) -> list[Any]:
        return [*super().start_build(), *(self._critic.start_build() if self._critic else ())]

    def connect(self, engine_urls: Sequence[str], weights_directory: Path, engine_model: Path) -> None:
        """Prepare to publish.

        Args:
            weights_directory: where versions go that are sent through disk.
            engine_model: what the engines were started from, if that is not the trainer's model.
        """
        self._on_all("connect", list(engine_urls), str(weights_directory), str(engine_model))

    def publish(self, version: int) -> SyncReport:
        """Send the weights to the engines."""
        reports = [report for report in self._on_all("publish", version) if report is not None]
        assert len(reports) == 1, "exactly rank 0 publishes"
        return reports[0]

    def score(self, shards: Sequence[Sequence[TrainSample]]) -> list[dict[str, ScoredColumns]]:
        """What the models say of one share per data-parallel rank, under the weights as they are."""
        if self._critic is None:
            return self._on_shards("score", shards)
        calls = self._critic.start_values(shards)
        return with_values(self._on_shards("score", shards), calls.results())

    def update(self, shards: Sequence[Sequence[UpdateShare]]) -> list[UpdateReport]:
        """Train on one share per data-parallel rank; the report of each."""
        if self._critic is None:
            return self._on_shards("update", shards)
        alone = in_warmup(self._config, num_critic_updates=self._critic.num_updates())
        calls = self._critic.start_update(shards)
        reports = [critic_report(shares) for shares in shards] if alone else self._on_shards("update", shards)
        return with_critic_metrics(reports, calls.results()[0])

    def begin_checkpoint(self, directory: Path) -> None:
        super().begin_checkpoint(directory)
        if self._critic is not None:
            self._critic.begin_checkpoint(directory / CHECKPOINT_NAME)

    def checkpoint_written(self) -> bool:
        return super().checkpoint_written() and (self._critic is None or self._critic.checkpoint_written())

    def finish_checkpoint(self) -> None:
        if self._critic is not None:
            self._critic.finish_checkpoint()
        super().finish_checkpoint()

    def find_checkpoint_faults(self, directory: Path) -> list[str]:
        faults = super().find_checkpoint_faults(directory)
        if self._critic is not None:
            faults += self._critic.find_checkpoint_faults(directory / CHECKPOINT_NAME)
        return faults

    def load_checkpoint(self, directory: Path) -> None:
        super().load_checkpoint(directory)
        if self._critic is not None:
            self._critic.load_checkpoint(directory / CHECKPOINT_NAME)

    def save_hf(self, directory: Path) -> None:
        self._on_all("save_hf", str(directory))

    def close(self) -> None:
        """Leave the engines and end the actors."""
        try:
            super().close()
        finally:
            if self._critic is not None:
                self._critic.close()


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
