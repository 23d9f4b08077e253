"""The ranks of a run as Ray actors, seen from the driver: those of the policy, and those of a critic that has its own.

Actors die with the driver: Ray ends the workers of a job whose driver is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from polyturn.configs.errors import RunFailure
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig, SharedPrefix
from polyturn.configs.sizing.placement import Seat
from polyturn.rollout.engines.reservation import Reservation
from polyturn.trainer.data.balance import share_out, split_over_ranks
from polyturn.trainer.data.samples import SKIPPED, UNMOVED, TrainSample, Update, UpdateReport
from polyturn.trainer.ranks.rank import CriticRank, PolicyRank, Rank
from polyturn.trainer.weight_sync import SyncReport

if TYPE_CHECKING:
    from polyturn.trainer.megatron.offload import StatePart

START_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 20.0
DEATH_NOTICE_S = 30.0
"""How long Ray may take to tell that an actor has died, when another one has already lost its connection to it."""
CRITIC_FOLDER = "critic"
"""The folder of a checkpoint that holds the state of a critic with ranks of its own."""

R = TypeVar("R", bound=Rank)
T = TypeVar("T")


class Trainer:
    """The models that are trained: all ranks of the policy, and those of a critic that has its own.

    Its methods take and give what is of a whole step; each model's ranks share it out among themselves.
    """

    def __init__(self, config: RunConfig, *, model_path: Path, reservation: Reservation) -> None:
        """`reservation`: what the run has of the Ray cluster, and where in it each rank sits."""
        self._config = config
        self._model_path = model_path
        self._reservation = reservation
        self._start()

    def _start(self) -> None:
        config, model_path, trainer = self._config, self._model_path, self._config.trainer
        reservation, placement = self._reservation, self._reservation.placement
        self._policy = Ranks(
            PolicyRank,
            config=config,
            model_path=model_path,
            parallel=trainer.parallel,
            seats=placement.policy,
            reservation=reservation,
            shared_prefix=trainer.shared_prefix,
        )
        self._critic: Ranks[CriticRank] | None = None
        if trainer.critic_has_ranks:
            self._critic = Ranks(
                CriticRank,
                config=config,
                model_path=model_path,
                parallel=trainer.critic.parallel,
                seats=placement.critic,
                reservation=reservation,
            )
        self._models: list[Ranks[Any]] = [self._policy, *([self._critic] if self._critic else [])]

    def build(self) -> None:
        """Load the models on all ranks."""
        ray.get([call for ranks in self._models for call in ranks.start_build()])

    def restart(self) -> None:
        """Start all ranks anew and load the models: what is left of those before is ended, whatever it waits for."""
        for ranks in reversed(self._models):
            ranks.kill()
        self._start()
        self.build()

    def death_behind(self, failure: BaseException) -> RayActorError | None:
        """The death of a rank that made a call of this trainer fail; None where all are alive.

        Another rank may have been the first to fail, by the connection that it lost, and others may wait for ever.
        """
        if isinstance(failure, RayTaskError) and not isinstance(failure.cause, RuntimeError | OSError):
            return None
        for ranks in self._models:
            death = ranks.find_death()
            if death is not None:
                return death
        return None

    def connect(self, engine_urls: Sequence[str], weights_directory: Path, engine_model: Path) -> None:
        """Prepare to publish.

        Args:
            weights_directory: where versions go that are sent through disk.
            engine_model: what the engines were started from, if that is not the trainer's model.
        """
        self._policy.on_all(lambda rank: rank.connect(engine_urls, weights_directory, engine_model))

    def set_engines(self, urls: Sequence[str]) -> None:
        """From now on publish to these engines. Raises `WeightSyncError` where one cannot be reached."""
        self._policy.on_all(lambda rank: rank.set_engines(urls))

    def prepare_weights(self, version: int) -> None:
        """Do what can be done of an update of the engines' weights while they serve."""
        self._policy.on_all(lambda rank: rank.prepare_weights(version))

    def activate_weights(self) -> SyncReport:
        """Have the engines take what was prepared, while they rest.

        Raises:
            WeightSyncError: names the engines that did not. The trainer is as it was, and may prepare again.
        """
        reports = self._policy.on_all(lambda rank: rank.activate_weights())
        (report,) = [report for report in reports if report is not None]
        return report

    def offload(self, part: StatePart, *, timeout_s: float) -> int:
        """Move a part of the state of the policy's ranks to their hosts' memory; the bytes of the one that has most.

        A critic with ranks of its own stays where it is.

        Raises:
            RunFailure: a rank has not done it in time.
        """
        return max(
            self._policy.on_all(
                lambda rank: rank.offload(part), within_s=timeout_s, done="given its GPU's memory up"
            )
        )

    def reload(self, *, timeout_s: float) -> None:
        """Take back what was moved there. Raises as `offload`."""
        self._policy.on_all(
            lambda rank: rank.reload(), within_s=timeout_s, done="taken its GPU's memory back"
        )

    def score(self, samples: Sequence[TrainSample]) -> dict[str, TrainSample]:
        """The samples with what the models say of them under the weights as they are, by sample id."""
        if not samples:
            return {}
        calls = [self._policy.start_on_samples(PolicyRank.score, samples)]
        if self._critic is not None:
            calls.append(self._critic.start_on_samples(CriticRank.score, samples))
        columns: dict[str, dict[str, Any]] = {}
        for call in calls:
            for found in call.results():
                for sample_id, of_sample in found.items():
                    columns[sample_id] = {**columns.get(sample_id, {}), **of_sample}
        return {sample.sample_id: replace(sample, **columns[sample.sample_id]) for sample in samples}

    def cross_entropy(self, samples: Sequence[TrainSample]) -> float:
        """The mean of -log p over the trainable tokens of samples, at temperature 1, by the weights as they are."""
        sums = self._policy.start_on_samples(PolicyRank.surprise, samples).results()
        return sum(sums) / sum(sample.num_trainable for sample in samples)

    def update(self, updates: Sequence[Update]) -> list[UpdateReport]:
        """Train on a step; the report of each data-parallel rank of the policy."""
        if self._critic is None:
            return self._policy.start_on_updates(PolicyRank.update, updates).results()
        (num_updates, *_) = self._critic.on_all(lambda rank: rank.critic.num_updates)
        call = self._critic.start_on_updates(CriticRank.update, updates)
        if self._config.trainer.critic_warms_up(num_updates):
            reports = [_left_out(share) for share in self._policy.share_out(updates)]
        else:
            reports = self._policy.start_on_updates(PolicyRank.update, updates).results()
        metrics = call.results()[0]
        return [
            replace(
                report,
                metrics=tuple({**ours, **its} for ours, its in zip(report.metrics, metrics, strict=True)),
            )
            for report in reports
        ]

    @contextmanager
    def profiled(self, step: int, directory: Path) -> Iterator[None]:
        """Profile what the policy's ranks do in the block, if the config names the step; a file for each in the
        directory."""
        if step not in self._config.trainer.profile.steps:
            yield
            return
        self._policy.on_all(lambda rank: rank.profiler.begin())
        yield
        self._policy.on_all(lambda rank: rank.profiler.end(directory, step))

    def begin_checkpoint(self, directory: Path) -> None:
        """Copy the state on all ranks; they write it while the run goes on."""
        directory.mkdir(parents=True, exist_ok=True)
        self._policy.on_all(lambda rank: rank.policy.begin_checkpoint(directory))
        if self._critic is not None:
            folder = directory / CRITIC_FOLDER
            folder.mkdir(exist_ok=True)
            self._critic.on_all(lambda rank: rank.begin_checkpoint(folder))

    def checkpoint_written(self) -> bool:
        """Whether `finish_checkpoint` would not have to wait for a disk."""
        return all(
            written
            for ranks in self._models
            for written in ranks.on_all(lambda rank: rank.checkpoints.written())
        )

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that was begun: for the policy's part last, which makes all of it finished.

        Raises:
            CheckpointError: a rank could not write it.
        """
        for ranks in reversed(self._models):
            ranks.on_all(lambda rank: rank.checkpoints.finish())

    def find_checkpoint_faults(self, directory: Path) -> list[str]:
        """What is wrong with the files of a checkpoint, which the ranks read among themselves."""
        faults = self._policy.on_all(lambda rank: rank.checkpoints.find_faults(directory))
        if self._critic is not None:
            faults += self._critic.on_all(
                lambda rank: rank.checkpoints.find_faults(directory / CRITIC_FOLDER)
            )
        return [fault for of_rank in faults for fault in of_rank]

    def load_checkpoint(self, directory: Path) -> None:
        self._policy.on_all(lambda rank: rank.policy.load_checkpoint(directory))
        if self._critic is not None:
            self._critic.on_all(lambda rank: rank.load_checkpoint(directory / CRITIC_FOLDER))

    def save_hf(self, directory: Path) -> None:
        """Write the policy as a Hugging Face directory, and its adapters, if it has any, beside it."""
        self._policy.on_all(lambda rank: rank.save_hf(directory))

    def close(self) -> None:
        """Leave the engines and end the actors."""
        with ExitStack() as stack:
            for ranks in reversed(self._models):
                stack.callback(ranks.close)


def _left_out(updates: Sequence[Update]) -> UpdateReport:
    """The report of a rank of the policy that was left out of a step, because the critic warms up."""
    trained = {sample.sample_id: sample.num_trainable for update in updates for sample in update.samples}
    metrics = tuple(SKIPPED if update.is_empty else UNMOVED for update in updates)
    return UpdateReport(metrics=metrics, trained_tokens=trained)


class Call:
    """A call under way on all ranks."""

    def __init__(self, references: Sequence[Any], *, answering: Sequence[int]) -> None:
        """`answering`: the ranks whose results are asked for."""
        self._references = list(references)
        self._answering = answering

    def results(self, *, within_s: float | None = None, done: str = "answered") -> list[Any]:
        """Wait for all ranks; what the answering ones gave.

        Raises what the first of them to fail raised, and does not wait for the others: they may wait for it. Raises
        `RunFailure` that names the ranks that are not done in time.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        pending = list(self._references)
        found: dict[Any, Any] = {}
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ended, pending = ray.wait(pending, timeout=left)
            if not ended:
                late = [str(rank) for rank, call in enumerate(self._references) if call in pending]
                raise RunFailure(f"trainer rank {', '.join(late)} has not {done} within {within_s:g} s")
            found.update(zip(ended, ray.get(ended), strict=True))
        return [found[self._references[rank]] for rank in self._answering]


class Ranks(Generic[R]):
    """Starts one actor per rank of a layout, and calls them together."""

    def __init__(
        self,
        kind: type[R],
        *,
        config: RunConfig,
        model_path: Path,
        parallel: ParallelConfig,
        seats: Sequence[Seat],
        reservation: Reservation,
        shared_prefix: SharedPrefix = "off",
    ) -> None:
        """`shared_prefix`: what samples that begin alike are to these ranks, as `trainer.shared_prefix` says it."""
        assert len(seats) == parallel.world_size, "a seat for each rank"
        self._parallel = parallel
        self._balance = config.trainer.balance
        self._shared_prefix = shared_prefix
        threads = str(config.trainer.threads_per_rank)
        actor = ray.remote(kind)
        self._ranks = [
            actor.options(
                num_cpus=1,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}},
                scheduling_strategy=reservation.on(seat),
            ).remote(config=config, model_path=str(model_path), rank=rank, gpus=reservation.gpus(seat))
            for rank, seat in enumerate(seats)
        ]

    def start_build(self) -> list[Any]:
        """Begin to load the model on all ranks; the references to wait for."""
        address, port = ray.get(self._ranks[0].rendezvous.remote(), timeout=START_TIMEOUT_S)
        return [rank.build.remote(address, port) for rank in self._ranks]

    def on_all(
        self, task: Callable[[R], T], *, within_s: float | None = None, done: str = "answered"
    ) -> list[T]:
        """What a function of a rank, which runs there, gives on each. Raises as `Call.results`."""
        calls = [rank.run.remote(task) for rank in self._ranks]
        return Call(calls, answering=range(len(calls))).results(within_s=within_s, done=done)

    def start_on_samples(self, task: Callable[[R, Any], Any], samples: Sequence[TrainSample]) -> Call:
        """Begin a function of a rank and of its share of samples; see `start_on_shares`."""
        shares = split_over_ranks(
            samples, self._parallel.data, self._balance, shared_prefix=self._shared_prefix
        )
        return self.start_on_shares(task, shares)

    def start_on_updates(self, task: Callable[[R, Any], Any], updates: Sequence[Update]) -> Call:
        """Begin a function of a rank and of its share of each update; see `start_on_shares`."""
        return self.start_on_shares(task, self.share_out(updates))

    def share_out(self, updates: Sequence[Update]) -> list[list[Update]]:
        """For each data-parallel copy of the model its share of each update."""
        return share_out(updates, self._parallel.data, self._balance, shared_prefix=self._shared_prefix)

    def start_on_shares(self, task: Callable[[R, Any], Any], shares: Sequence[Any]) -> Call:
        """Begin a function of a rank and of one share per data-parallel copy; the first rank of each answers.

        All ranks of one copy of the model get the same share and find the same, so that of the others nothing but their
        end, or their failure, leaves the rank.
        """
        assert len(shares) == self._parallel.data, "one share per data-parallel rank"
        references = [ray.put(share) for share in shares]
        answering = self._parallel.first_ranks()
        calls = []
        for rank, actor in enumerate(self._ranks):
            run = actor.run if rank in answering else actor.run_silently
            calls.append(run.remote(task, references[self._parallel.place(rank).data]))
        return Call(calls, answering=answering)

    def find_death(self) -> RayActorError | None:
        """How the first rank that has died did so; None: none has, as far as Ray knows within `DEATH_NOTICE_S`.

        Those that are alive answer as soon as they have nothing else to do, which may be never.
        """
        waiting = [rank.__ray_ready__.remote() for rank in self._ranks]
        deadline = time.monotonic() + DEATH_NOTICE_S
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            answered, waiting = ray.wait(waiting, timeout=left_s)
            for one in answered:
                try:
                    ray.get(one)
                except RayActorError as death:
                    return death
        return None

    def close(self) -> None:
        """End the actors, also those that wait for one that has failed."""
        calls = [rank.close.remote() for rank in self._ranks]
        try:
            closed, _busy = ray.wait(calls, num_returns=len(calls), timeout=CLOSE_TIMEOUT_S)
            ray.get(closed)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the actors at once."""
        for rank in self._ranks:
            ray.kill(rank)
