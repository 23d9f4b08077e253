"""One rank of the policy, or of a critic with ranks of its own, as a Ray actor, and the two visits of a step's samples
to it: they are scored with the weights as they are, then trained on.

The driver says what a rank is to do by a function of the rank, which runs where the rank is (`Rank.run`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import ray

from polyturn.configs.addresses import bind_address
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.rollout.engines.placement import free_port, gpu_environment
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.samples import SKIPPED, UNMOVED, Columns, TrainSample, Update, UpdateReport
from polyturn.trainer.models.hf_directory import FP8Cast, read_config
from polyturn.trainer.models.quantization import starts_engines
from polyturn.trainer.ranks.profiling import RankProfiler
from polyturn.trainer.ranks.publishers import all_ranks_publish, make_publisher
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher

if TYPE_CHECKING:
    import torch

    from polyturn.trainer.megatron.checkpoints import Checkpoints
    from polyturn.trainer.megatron.critic import MegatronCritic
    from polyturn.trainer.megatron.offload import OffloadedState, StatePart
    from polyturn.trainer.megatron.policy import MegatronPolicy
    from polyturn.trainer.megatron.process_groups import Place

NamedTensors = Iterable[tuple[str, "torch.Tensor"]]
Cast = Callable[[NamedTensors], NamedTensors]
"""What becomes of the weights on their way to the engines."""
ADAPTER_NAME = "adapter"
CRITIC_METRICS = ("loss", "clip_fraction", "error", "error_max", "grad_norm", "learning_rate")
"""What a step's metrics say of the critic, as `critic/NAME`."""


class Rank:
    """One rank of a model, in a process of its own."""

    checkpoints: Checkpoints
    """Of the models in this process."""

    def __init__(self, *, config: RunConfig, model_path: str, rank: int, gpus: Sequence[str] = ()) -> None:
        """`gpus`: its own, as `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
        self._config = config
        self._gpus = tuple(gpus)
        self._model_path = Path(model_path)
        self._rank = rank
        self.profiler = RankProfiler(config.trainer.profile, rank=rank, device=config.trainer.device)

    def rendezvous(self) -> tuple[str, int]:
        """An address and a free port of this rank's host."""
        address = bind_address(ray.util.get_node_ip_address())
        return address, free_port(address)

    def build(self, address: str, port: int) -> None:
        """Join the other ranks at the first one's address and load the model."""
        raise NotImplementedError

    def run(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of this rank gives."""
        return task(self, *arguments)

    def run_silently(self, task: Callable[..., Any], *arguments: Any) -> None:
        """The same, but what it gives stays here."""
        task(self, *arguments)

    def close(self) -> None:
        """Leave the other ranks."""
        from polyturn.trainer.megatron.process_groups import leave_ranks

        leave_ranks()

    def _see_own_gpu(self) -> None:
        """Hide the GPUs of others from this process before CUDA is first used.

        On the CPU all are hidden: Megatron-core takes one that it finds.
        """
        os.environ.update(gpu_environment(self._gpus))

    def _place(self, parallel: ParallelConfig, address: str, port: int) -> Place:
        from polyturn.trainer.megatron.process_groups import Place

        return Place(rank=self._rank, world_size=parallel.world_size, address=address, port=port)


class PolicyRank(Rank):
    """One rank of the policy, and of the critic unless that has ranks of its own."""

    policy: MegatronPolicy
    critic: MegatronCritic | None = None
    _offloaded: OffloadedState
    _publisher: WeightPublisher | None = None
    """Of rank 0; of the others where they, too, hand something to engines."""
    _cast: Cast | None = None
    _exported: Iterator[tuple[str, torch.Tensor]] = iter(())
    """What is left of the tensors that are being published."""

    def build(self, address: str, port: int) -> None:
        self._see_own_gpu()
        from polyturn.trainer.megatron.critic import MegatronCritic
        from polyturn.trainer.megatron.offload import OffloadedState
        from polyturn.trainer.megatron.policy import MegatronPolicy

        trainer = self._config.trainer
        self.policy = MegatronPolicy(self._config, self._place(trainer.parallel, address, port))
        self.checkpoints = self.policy.checkpoints
        if trainer.uses_critic and not trainer.critic_has_ranks:
            self.critic = MegatronCritic(self._config)
            self.checkpoints.include("critic", self.critic.engine)
        engines = [self.policy.engine, *([self.critic.engine] if self.critic else [])]
        self._offloaded = OffloadedState(engines)

    def offload(self, part: StatePart) -> int:
        """Move a part of the state to the host's memory; its bytes, 0 if it is there."""
        return self._offloaded.offload(part)

    def reload(self) -> None:
        """Take the state back from the host's memory, as far as it is there."""
        self._offloaded.reload()

    def connect(self, engine_urls: Sequence[str], weights_directory: Path, engine_model: Path) -> None:
        """Prepare to publish weights to the engines, of which rank 0 alone knows."""
        if self._rank != 0 and not all_ranks_publish(self._config):
            return
        sync = self._config.weight_sync
        hf_config = orjson.loads((self._model_path / "config.json").read_bytes())
        if sync.dtype != "same":
            fp8 = FP8Cast(self._model_path)
            self._cast = fp8 if sync.dtype == "fp8_block" else fp8.rounded
        self._publisher = make_publisher(
            self._config,
            hf_config,
            served_model=self._model_path if starts_engines(hf_config, sync.dtype) else engine_model,
            weights_directory=weights_directory,
            address=self.rendezvous()[0],
            adapter_config=self.policy.adapter_config,
        )
        self.set_engines(engine_urls)

    def set_engines(self, urls: Sequence[str]) -> None:
        """From now on publish to these engines."""
        if self._publisher is not None and self._rank == 0:
            self._publisher.set_engines(urls)

    def prepare_weights(self, version: int) -> None:
        """Do what can be done of an update of the engines' weights while they serve. Every rank takes part."""
        policy = self.policy
        self._exported = (
            policy.named_adapter_tensors() if self._config.serves_adapters else policy.named_hf_tensors()
        )
        if self._publisher is None:
            if not self._config.weight_sync.gathers_in_activate:
                self._gather_rest()
            return
        with ExitStack() as on_failure:
            on_failure.callback(self._gather_rest)
            tensors = self._cast(self._exported) if self._cast else self._exported
            self._publisher.prepare(tensors, version=version)
            on_failure.pop_all()

    def activate_weights(self) -> SyncReport | None:
        """Have the engines take what was prepared, while they rest. Every rank takes part; rank 0 reports."""
        try:
            report = None if self._publisher is None else self._publisher.activate()
        finally:
            # The other ranks do both, whatever became of the engines.
            self._gather_rest()
            correlation = None if self._config.serves_adapters else self.policy.adapter_correlation()
        return None if report is None or self._rank != 0 else replace(report, adapter_correlation=correlation)

    def _gather_rest(self) -> None:
        """Go through what is left of the tensors, with the other ranks, which may be in the middle of one."""
        for _ in self._exported:
            continue

    def surprise(self, samples: Sequence[TrainSample]) -> float:
        """The sum of -log p over the trainable tokens of this rank's samples, at temperature 1."""
        columns = self.policy.logprobs(samples, temperature=1.0)
        return -sum(
            float(column[sample.sampled].sum(dtype="float64"))
            for sample, column in zip(samples, columns, strict=True)
        )

    def score(self, samples: Sequence[TrainSample]) -> dict[str, Columns]:
        """What the step needs to know of this rank's samples under the weights as they are, by sample id.

        The logprobs of the policy, unless the sampler's stand in for them; those of the reference if there is a KL;
        values if there is a critic here.
        """
        algorithm, temperature = self._config.algorithm, self._config.rollout.sampling.temperature
        columns: dict[str, Sequence[Any]] = {}
        if algorithm.proximal == "scored":
            columns["proximal_logprobs"] = self.policy.logprobs(samples, temperature=temperature)
        else:
            columns["proximal_logprobs"] = [sample.behavior_logprobs for sample in samples]
        if self._config.trainer.needs_reference:
            columns["reference_logprobs"] = self.policy.reference_logprobs(samples, temperature=temperature)
        if self.critic is not None:
            columns["values"] = self.critic.values(samples)
        return {
            sample.sample_id: dict(zip(columns, found, strict=True))
            for sample, *found in zip(samples, *columns.values(), strict=True)
        }

    def update(self, updates: Sequence[Update]) -> UpdateReport:
        """Train on this rank's share of a step: the critic, if there is one here, and the policy, unless the critic is
        warming up.

        An update that no rank has a token for is skipped and counted: a step of the optimizer without a gradient would
        still move the weights, by momentum and decay. The schedule goes on, so that updates and policy versions stay
        level.
        """
        trainer, policy, critic = self._config.trainer, self.policy, self.critic
        objective = Objective.of_run(self._config)
        metrics: list[Mapping[str, float]] = []
        trained: dict[str, int] = {}
        critic_alone = critic is not None and trainer.critic_warms_up(critic.num_updates)
        for update in updates:
            if update.is_empty:
                metrics.append(SKIPPED)
                policy.num_updates += not critic_alone
                continue
            found = {} if critic is None else train_critic(critic, update)
            if critic_alone:
                metrics.append({**UNMOVED, **found})
            else:
                of_policy = policy.train(update.samples, objective=objective, global_counts=update.counts)
                metrics.append({**of_policy, **found})
            for sample in update.samples:
                trained[sample.sample_id] = trained.get(sample.sample_id, 0) + sample.num_trainable
        every = trainer.refresh_reference_every_steps * trainer.updates_per_step
        is_due = every and policy.num_updates and policy.num_updates % every == 0
        if is_due and trainer.needs_reference:
            policy.refresh_reference()
        return UpdateReport(
            metrics=tuple(metrics),
            trained_tokens=trained,
            shared_prefix=self._saved_by_sharing() if trainer.shared_prefix == "tree" else {},
        )

    def _saved_by_sharing(self) -> dict[str, float]:
        sharing, flops = self.policy.take_sharing()
        return {
            "tokens": sharing.saved_fraction(token=1.0),
            "attention": sharing.saved_fraction(pair=1.0),
            "flops": sharing.saved_fraction(token=flops.token, pair=flops.pair),
        }

    def save_hf(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory, and its adapters, if it has any, beside it."""
        self.policy.save_hf(directory)
        if self.policy.lora is not None:
            self.policy.save_adapter(directory.with_name(ADAPTER_NAME))

    def close(self) -> None:
        """Leave the engines and the other ranks."""
        if self._publisher is not None:
            self._publisher.close()
        # A rank whose model could not be built has nothing to leave.
        if hasattr(self, "policy"):
            self.policy.close()


class CriticRank(Rank):
    """One rank of a critic that has ranks of its own."""

    def build(self, address: str, port: int) -> None:
        self._see_own_gpu()
        from polyturn.trainer.megatron.checkpoints import Checkpoints
        from polyturn.trainer.megatron.critic import MegatronCritic
        from polyturn.trainer.megatron.process_groups import join_ranks

        trainer, parallel = self._config.trainer, self._config.trainer.critic.parallel
        place = self._place(parallel, address, port)
        join_ranks(parallel, place, device=trainer.device, seed=self._config.seed)
        self.critic = MegatronCritic(self._config)
        self.checkpoints = Checkpoints(
            {"critic": self.critic.engine},
            hf_config=read_config(self._model_path),
            parallel=parallel,
            dtype=self._config.model.dtype,
        )

    def score(self, samples: Sequence[TrainSample]) -> dict[str, Columns]:
        """The values of this rank's samples, by sample id."""
        values = self.critic.values(samples)
        return {sample.sample_id: {"values": found} for sample, found in zip(samples, values, strict=True)}

    def update(self, updates: Sequence[Update]) -> list[dict[str, float]]:
        """Train on this rank's share of a step; the metrics of each update, none for one that is skipped."""
        return [{} if update.is_empty else train_critic(self.critic, update) for update in updates]

    def begin_checkpoint(self, directory: Path) -> None:
        self.checkpoints.begin(directory, num_updates=self.critic.num_updates)

    def load_checkpoint(self, directory: Path) -> None:
        self.checkpoints.load(directory, with_optimizer=self._config.checkpoint.load_optimizer)


def train_critic(critic: MegatronCritic, update: Update) -> dict[str, float]:
    """One update of the critic; its metrics."""
    metrics = critic.train(update.samples, global_counts=update.counts)
    return {f"critic/{name}": metrics[name] for name in CRITIC_METRICS}
