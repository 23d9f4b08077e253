"""What a config asks for, in numbers: the batch and the placement."""

from __future__ import annotations

import os
from dataclasses import dataclass

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.algorithm import GroupedSection
from polyturn.configs.schema.engines import ServedModel
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig


def check_batch(config: RunConfig) -> str:
    """The batch arithmetic as a line to print.

    `prompts_per_step x samples_per_prompt = global batch x updates per step`. Raises ConfigError where it
    does not hold, with both sides and a way to mend it, and where a group or a rank's share would be empty.
    """
    rollout, trainer = config.rollout, config.trainer
    episodes = rollout.prompts_per_step * rollout.samples_per_prompt
    trained = trainer.global_batch_size * trainer.updates_per_step
    sampled_side = f"{rollout.prompts_per_step} x {rollout.samples_per_prompt} = {episodes}"
    trained_side = f"{trainer.global_batch_size} x {trainer.updates_per_step} = {trained}"
    if episodes != trained:
        if episodes % trainer.updates_per_step == 0:
            fix = f"trainer.global_batch_size={episodes // trainer.updates_per_step}"
        else:
            fix = f"trainer.global_batch_size={episodes} trainer.updates_per_step=1"
        raise ConfigError(
            "rollout.prompts_per_step x rollout.samples_per_prompt must equal trainer.global_batch_size x "
            f"trainer.updates_per_step, but {sampled_side} and {trained_side}; for example set {fix}"
        )
    advantages = [algorithm.advantage for algorithm in trainer.algorithms]
    compares = any(
        isinstance(found, GroupedSection) and found.singletons != "batch_mean" for found in advantages
    )
    if rollout.samples_per_prompt == 1 and compares:
        raise ConfigError(
            "rollout.samples_per_prompt is 1, but a group of one episode has no baseline and trains nothing; "
            "use at least 2, or a trainer.algorithm.advantage that does not compare within groups (ppo_gae)"
        )
    if trainer.global_batch_size < trainer.parallel.data:
        raise ConfigError(
            f"trainer.global_batch_size is {trainer.global_batch_size}, less than one episode for each of "
            f"the trainer.parallel.data={trainer.parallel.data} ranks; lower trainer.parallel.data"
        )
    return (
        f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {episodes} episodes "
        f"a step = {trainer.global_batch_size} global batch x {trainer.updates_per_step} update(s)"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One process of a run and where it runs."""

    name: str
    device: str
    note: str


def placement(config: RunConfig) -> list[Placed]:
    """The processes of a run.

    Trainer ranks are numbered with the tensor axis fastest, as Megatron numbers them. In a synchronous step
    engines and ranks take turns, so on a CPU they share the cores; each has GPUs of its own, and Ray chooses
    which.
    """
    engines, trainer = config.engines, config.trainer
    rows = []
    num_engines = engines.num_engines if config.rollout.replay is None else 0
    if num_engines and not config.asks_engines_directly:
        rows.append(Placed(name="router", device="cpu", note=f"port {engines.router.port or 'free'}"))
    for index in range(num_engines):
        port = engines.port + index if engines.port else "free"
        rows.append(
            Placed(
                name=f"engine {index}",
                device=_devices(engines.device, engines.tensor_parallel),
                note=f"tensor {engines.tensor_parallel}, port {port}",
            )
        )
    for model in config.served_models:
        rows += _places_of(model)
    for rank in range(trainer.parallel.world_size):
        threads = f", {trainer.threads_per_rank} thread(s)" if trainer.device == "cpu" else ""
        rows.append(
            Placed(
                name=f"trainer rank {rank}",
                device=_devices(trainer.device, 1),
                note=_place(trainer.parallel, rank) + threads,
            )
        )
    if trainer.critic_has_ranks:
        for rank in range(trainer.critic.parallel.world_size):
            rows.append(
                Placed(
                    name=f"critic rank {rank}",
                    device=_devices(trainer.device, 1),
                    note=_place(trainer.critic.parallel, rank),
                )
            )
    return rows


def _places_of(model: ServedModel) -> list[Placed]:
    """The engines of a teacher or a judge, where they are the run's own."""
    servers = model.engines
    if not model.is_managed:
        return []
    return [
        Placed(
            name=f"{model.name} engine {index}",
            device=_devices(servers.device, servers.tensor_parallel),
            note=f"tensor {servers.tensor_parallel}, port {servers.port + index if servers.port else 'free'}",
        )
        for index in range(servers.num_engines)
    ]


def num_gpus(config: RunConfig) -> int:
    """GPUs that the run needs: engines and trainer ranks have their own."""
    engines, trainer = config.engines, config.trainer
    for_engines = engines.num_gpus if config.rollout.replay is None else 0
    served = sum(model.engines.num_gpus for model in config.served_models if model.is_managed)
    return for_engines + served + (trainer.num_ranks if trainer.device == "cuda" else 0)


def num_cores() -> int:
    """Cores that this process may use."""
    # Not every system can say which; macOS cannot.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _place(parallel: ParallelConfig, rank: int) -> str:
    """A rank's place on the axes of tensor and data, and on every other axis that there is."""
    place = parallel.place(rank)
    axes = [("tensor", place.tensor), ("data", place.data)]
    for axis in ("context", "pipeline", "expert"):
        if getattr(parallel, axis) > 1:
            axes.append((axis, getattr(place, axis)))
    return ", ".join(f"{axis} {number}" for axis, number in axes)


def _devices(device: str, num_gpus: int) -> str:
    return "cpu" if device == "cpu" else f"{num_gpus} GPU(s)"
