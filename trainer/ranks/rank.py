"""One rank of the policy, or of a critic with ranks of its own, as a Ray actor, and the two visits of a step's samples
to it: they are scored with the weights as they are, then trained on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import orjson
import ray

from polyturn.configs.addresses import bind_address
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import BroadcastSync, RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.placement import assigned_gpus, free_port, gpu_environment
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.checkpoints.sources import initial_weights
from polyturn.trainer.data.samples import (
    SKIPPED,
    UNMOVED,
    ScoredColumns,
    TrainSample,
    UpdateReport,
    UpdateShare,
    Values,
    in_warmup,
)
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher

if TYPE_CHECKING:
    from polyturn.trainer.megatron.critic import MegatronCritic
    from polyturn.trainer.megatron.policy import MegatronPolicy
    from polyturn.trainer.models.hf_directory import FP8Cast


ADAPTER_NAME = "adapter"


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
            from polyturn.trainer.models.hf_directory import FP8Cast

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


def make_critic(config: RunConfig, *, model_path: Path, parallel: ParallelConfig) -> MegatronCritic:
    """The critic of a run, in a process that is a rank already."""
    from polyturn.trainer.megatron.critic import MegatronCritic

    trainer, critic = config.trainer, config.trainer.critic
    return MegatronCritic(
        model_path if critic.path is None else resolve_model_path(critic.path),
        dtype=config.model.dtype,
        device=trainer.device,
        parallel=parallel,
        optimizer=critic.optimizer,
        megatron=config.megatron,
        max_tokens_per_gpu=critic.max_tokens_per_gpu or trainer.max_tokens_per_gpu,
        total_updates=trainer.total_updates,
        value_clip=critic.value_clip,
        seed=config.seed,
        shared_prefix="group" if parallel.context > 1 else trainer.shared_prefix,
    )


class CriticRank:
    """One rank of the critic, as a Ray actor."""

    def __init__(self, *, config: RunConfig, model_path: str, rank: int) -> None:
        self._config = config
        self._model_path = Path(model_path)
        self._rank = rank

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port of this rank's host."""
        address = bind_address(ray.util.get_node_ip_address())
        return address, free_port(address)

    def build(self, address: str, port: int) -> None:
        """Join the other ranks and load the model."""
        see_own_gpu(self._config.trainer.device)
        from polyturn.trainer.megatron.cpu import install_cpu_compatibility

        trainer = self._config.trainer
        install_cpu_compatibility(trainer.device)
        from polyturn.trainer.megatron.policy_checkpoints import PolicyCheckpoints
        from polyturn.trainer.megatron.process_groups import join_ranks
        from polyturn.trainer.models.hf_directory import read_config

        parallel = trainer.critic.parallel
        join_ranks(
            device=trainer.device,
            parallel=parallel,
            seed=self._config.seed,
            rank=self._rank,
            world_size=parallel.world_size,
            master_address=address,
            master_port=port,
        )
        self._critic = make_critic(self._config, model_path=self._model_path, parallel=parallel)
        self._checkpoints = PolicyCheckpoints(
            {"critic": self._critic.engine},
            hf_config=read_config(self._model_path),
            parallel=parallel,
            dtype=self._config.model.dtype,
        )

    def values(self, samples: Sequence[TrainSample]) -> Values:
        return score_values(self._critic, samples)

    def num_updates(self) -> int:
        return self._critic.num_updates

    def update(self, shares: Sequence[UpdateShare]) -> list[dict[str, float]]:
        """Train on this rank's share of a step; the metrics of each update, none for one that is skipped."""
        return [{} if share.is_empty else train_critic(self._critic, share) for share in shares]

    def begin_checkpoint(self, directory: str) -> None:
        self._checkpoints.begin(Path(directory), num_updates=self._critic.num_updates)

    def checkpoint_written(self) -> bool:
        return self._checkpoints.written()

    def finish_checkpoint(self) -> None:
        self._checkpoints.finish()

    def find_checkpoint_faults(self, directory: str) -> list[str]:
        return self._checkpoints.find_faults(Path(directory))

    def load_checkpoint(self, directory: str) -> None:
        self._checkpoints.load(Path(directory), with_optimizer=self._config.checkpoint.load_optimizer)

    def close(self) -> None:
        """Leave the other ranks."""
        from polyturn.trainer.megatron.process_groups import leave_ranks

        leave_ranks()


def score_samples(
    policy: MegatronPolicy,
    samples: Sequence[TrainSample],
    *,
    config: RunConfig,
    critic: MegatronCritic | None = None,
) -> dict[str, ScoredColumns]:
    """What the step needs to know of the samples, by sample id.

    The logprobs of the policy as it is, unless the sampler's stand in for them; those of the reference if there is a
    KL; values if there is a critic here.
    """
    temperature = config.rollout.sampling.temperature
    if config.trainer.algorithm.proximal == "scored":
        proximal = policy.logprobs(samples, temperature=temperature)
    else:
        proximal = [sample.behavior_logprobs for sample in samples]
    reference: Sequence[npt.NDArray[np.float32] | None] = [None] * len(samples)
    if config.trainer.algorithm.needs_reference:
        reference = policy.reference_logprobs(samples, temperature=temperature)
    values = {} if critic is None else score_values(critic, samples)
    return {
        sample.sample_id: ScoredColumns(
            proximal_logprobs=ours, reference_logprobs=theirs, values=values.get(sample.sample_id)
        )
        for sample, ours, theirs in zip(samples, proximal, reference, strict=True)
    }


def run_updates(
    policy: MegatronPolicy,
    shares: Sequence[UpdateShare],
    *,
    config: RunConfig,
    critic: MegatronCritic | None = None,
) -> UpdateReport:
    """Update once per share: the critic, if there is one here, and the policy, unless the critic is warming up.

    An update that no rank has a token for is skipped and counted: a step of the optimizer without a gradient would
    still move the weights, by momentum and decay. The schedule goes on, so that updates and policy versions stay level.
    """
    started = time.perf_counter()
    objective = Objective.from_config(
        config.trainer.algorithm, temperature=config.rollout.sampling.temperature
    )
    metrics = []
    trained: dict[str, int] = {}
    critic_alone = critic is not None and in_warmup(config, num_critic_updates=critic.num_updates)
    for share in shares:
        if share.is_empty:
            metrics.append(SKIPPED)
            policy.num_updates += not critic_alone
            continue
        found = {} if critic is None else train_critic(critic, share)
        if critic_alone:
            metrics.append({**UNMOVED, **found})
        else:
            update = policy.train(share.samples, objective=objective, global_counts=share.counts)
            metrics.append({**update, **found})
        for sample in share.samples:
            trained[sample.sample_id] = trained.get(sample.sample_id, 0) + sample.num_trainable
    _refresh_reference(policy, config)
    return UpdateReport(
        metrics=tuple(metrics),
        trained_tokens=trained,
        seconds=time.perf_counter() - started,
        shared_prefix=_saved(policy) if config.trainer.shared_prefix == "tree" else {},
    )


def _saved(policy: MegatronPolicy) -> dict[str, float]:
    sharing, flops = policy.take_sharing()
    return {
        "tokens": sharing.saved_fraction(token=1.0),
        "attention": sharing.saved_fraction(pair=1.0),
        "flops": sharing.saved_fraction(token=flops.token, pair=flops.pair),
    }


def _refresh_reference(policy: MegatronPolicy, config: RunConfig) -> None:
    every = config.trainer.refresh_reference_every_steps * config.trainer.updates_per_step
    if (
        policy.num_updates
        and every
        and config.trainer.algorithm.needs_reference
        and policy.num_updates % every == 0
    ):
        policy.refresh_reference()


REPORTED = ("loss", "clip_fraction", "error", "error_max", "grad_norm", "learning_rate")


def score_values(critic: MegatronCritic, samples: Sequence[TrainSample]) -> Values:
    """The values of this rank's samples."""
    columns = critic.values(samples)
    return {sample.sample_id: column for sample, column in zip(samples, columns, strict=True)}


def train_critic(critic: MegatronCritic, share: UpdateShare) -> dict[str, float]:
    """One update of the critic; its metrics."""
    metrics = critic.train(share.samples, global_counts=share.counts)
    return {f"critic/{name}": metrics[name] for name in REPORTED}


def see_own_gpu(device: str) -> None:
    """Hide the GPUs of others from this actor, where Ray was told not to, before CUDA is first used."""
    if device == "cuda":
        os.environ.update(gpu_environment(assigned_gpus(ray.get_gpu_ids(), 1)))
