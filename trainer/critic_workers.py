"""A critic with ranks of its own: the Ray actors, and all of them seen from the driver."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from polyturn.configs.addresses import bind_address
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.placement import free_port
from polyturn.trainer.batch import TrainSample, split_over_ranks
from polyturn.trainer.critic_updates import Values, score_values, train_critic
from polyturn.trainer.rank_group import Call, RankGroup, see_own_gpu
from polyturn.trainer.updates import UpdateShare

if TYPE_CHECKING:
    from polyturn.configs.schema.trainer import ParallelConfig
    from polyturn.trainer.megatron.critic import MegatronCritic

CHECKPOINT_NAME = "critic"
"""The folder of a checkpoint that holds the state of a critic with ranks of its own."""


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
        from polyturn.trainer.megatron.checkpoints.keeper import PolicyCheckpoints
        from polyturn.trainer.megatron.hf_directory import read_config
        from polyturn.trainer.megatron.ranks import join_ranks

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
        from polyturn.trainer.megatron.ranks import leave_ranks

        leave_ranks()


class CriticGroup(RankGroup):
    """All ranks of the critic. Its methods take what was cut for the policy's ranks and cut it anew."""

    def __init__(self, config: RunConfig, *, model_path: Path) -> None:
        super().__init__(
            CriticRank, config=config, model_path=model_path, parallel=config.trainer.critic.parallel
        )
        self._balance = config.trainer.balance

    def start_values(self, shards: Sequence[Sequence[TrainSample]]) -> Call:
        """Begin to score a step; it gives the values, by sample id."""
        samples = [sample for shard in shards for sample in shard]
        return self._start_on_shards("values", self._split(samples))

    def num_updates(self) -> int:
        """Updates so far, those of the run that was resumed among them."""
        return int(self._on_all("num_updates")[0])

    def start_update(self, shards: Sequence[Sequence[UpdateShare]]) -> Call:
        """Begin to train on a step; it gives each data-parallel rank's metrics, which are all alike."""
        own: list[list[UpdateShare]] = [[] for _ in range(self._parallel.data)]
        for shares in zip(*shards, strict=True):
            samples = [sample for share in shares for sample in share.samples]
            for rank, part in enumerate(self._split(samples)):
                own[rank].append(UpdateShare(samples=tuple(part), counts=shares[0].counts))
        return self._start_on_shards("update", own)

    def _split(self, samples: Sequence[TrainSample]) -> list[list[TrainSample]]:
        return split_over_ranks(samples, self._parallel.data, self._balance)
