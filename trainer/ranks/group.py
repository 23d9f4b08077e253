"""The ranks of a run as Ray actors, seen from the driver: those of the policy, and those of a critic that has its own.

Actors die with the driver: Ray ends the workers of a job whose driver is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.data.balance import split_over_ranks
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
from polyturn.trainer.ranks.rank import (
    CriticRank,
    TrainerRank,
)
from polyturn.trainer.weight_sync import SyncReport

START_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 20.0


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


CHECKPOINT_NAME = "critic"
"""The folder of a checkpoint that holds the state of a critic with ranks of its own."""


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


def with_values(
    scores: Sequence[Mapping[str, ScoredColumns]], values: Sequence[Values]
) -> list[dict[str, ScoredColumns]]:
    """What the policy's ranks computed of the samples with what the critic's did."""
    found = {sample_id: column for part in values for sample_id, column in part.items()}
    return [
        {sample_id: replace(columns, values=found[sample_id]) for sample_id, columns in part.items()}
        for part in scores
    ]


def with_critic_metrics(
    reports: Sequence[UpdateReport], metrics: Sequence[Mapping[str, float]]
) -> list[UpdateReport]:
    """The policy's reports with the critic's metrics of the same updates."""
    return [
        replace(
            report,
            metrics=tuple({**ours, **theirs} for ours, theirs in zip(report.metrics, metrics, strict=True)),
        )
        for report in reports
    ]


def critic_report(shares: Sequence[UpdateShare]) -> UpdateReport:
    """The report of a rank of the policy that was left out of a step, because the critic warms up."""
    trained = {sample.sample_id: sample.num_trainable for share in shares for sample in share.samples}
    metrics = tuple(SKIPPED if share.is_empty else UNMOVED for share in shares)
    return UpdateReport(metrics=metrics, trained_tokens=trained, seconds=0.0)


def _silently(actor: Any, method: str, share: Any) -> Any:
    """Call an actor's method there, and let its result stay behind."""
    return actor.__ray_call__.remote(_call, method, share)


def _call(rank: Any, method: str, share: Any) -> None:
    getattr(rank, method)(share)
