"""What a rank does in the tests of checkpoints: train, save, load at another layout, train on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from tests.support.megatron.layout_runs import OBJECTIVE, SMOOTH
from tests.support.megatron.ranks_pool import RankContext

NUM_BEFORE = 2
NUM_AFTER = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Continued:
    """What one rank saw after a checkpoint."""

    num_updates: int
    loaded: dict[str, torch.Tensor] | None
    """The exported weights before the first update, from rank 0."""
    metrics: list[dict[str, float]]
    trained: dict[str, torch.Tensor] | None
    """The exported weights after the last update, from rank 0."""


def save_and_go_on(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    directory: Path,
    dtype: str,
) -> Continued:
    """Train, save, and go on while the checkpoint is written."""
    policy = _open(context, path, layout, dtype)
    try:
        own = split_over_ranks(samples, layout.data)[policy.data_parallel_rank]
        _train(policy, own, samples, NUM_BEFORE)
        policy.begin_checkpoint(directory)
        assert not (directory / "trainer.json").exists()
        result = _go_on(context, policy, own, samples)
        policy.checkpoints.finish()
        return result
    finally:
        policy.close()


def load_and_go_on(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    directory: Path,
    dtype: str,
) -> Continued:
    """Load, go on."""
    policy = _open(context, path, layout, dtype)
    try:
        assert policy.checkpoints.find_faults(directory) == []
        policy.load_checkpoint(directory)
        own = split_over_ranks(samples, layout.data)[policy.data_parallel_rank]
        return _go_on(context, policy, own, samples)
    finally:
        policy.close()


def failing_save(context: RankContext, path: Path, directory: Path) -> tuple[str, str]:
    """A save in which rank 1 finds its file's place taken, as by a full disk: what `finish` raises, then what loads."""
    from polyturn.trainer.checkpoints.manifest import CheckpointError
    from tests.support.megatron.policies import save_checkpoint

    policy = _open(context, path, ParallelConfig(data=2), "float32")
    try:
        good, bad = directory / "good", directory / "bad"
        save_checkpoint(policy, good)
        if context.rank == 1:
            (bad / "rank-00001-of-00002.safetensors.part").mkdir(parents=True)
        policy.begin_checkpoint(bad)
        try:
            policy.checkpoints.finish()
        except CheckpointError as error:
            told = str(error)
        policy.load_checkpoint(good)
        try:
            policy.load_checkpoint(bad)
        except ValueError as error:
            return told, str(error)
        raise AssertionError("a checkpoint that was not finished was loaded")
    finally:
        policy.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A policy before its first update."""

    logprobs: list[np.ndarray]
    references: list[np.ndarray]
    num_updates: int
    num_optimizer_steps: int


def train_and_leave(
    context: RankContext, path: Path, samples: list[TrainSample], directory: Path
) -> list[np.ndarray]:
    """Train, leave a checkpoint `step` and a Hugging Face directory `hf`; the logprobs then."""
    from tests.support.megatron.policies import save_checkpoint

    policy = _open(context, path, ParallelConfig(), "float32")
    try:
        _train(policy, samples, samples, NUM_BEFORE)
        save_checkpoint(policy, directory / "step")
        policy.save_hf(directory / "hf")
        return policy.logprobs(samples)
    finally:
        policy.close()


def begin_with(
    context: RankContext, path: Path, samples: list[TrainSample], initial: Path, load_optimizer: bool
) -> Begun:
    """What a new run is before its first update."""
    from polyturn.trainer.megatron.checkpoint_state import num_optimizer_steps

    policy = _open(
        context, path, ParallelConfig(), "float32", initial_path=initial, load_optimizer=load_optimizer
    )
    try:
        return Begun(
            logprobs=policy.logprobs(samples),
            references=policy.reference_logprobs(samples),
            num_updates=policy.num_updates,
            num_optimizer_steps=num_optimizer_steps(policy._engine),
        )
    finally:
        policy.close()


def torch_dist_weights(
    context: RankContext, path: Path, layout: ParallelConfig, directory: Path
) -> dict[str, torch.Tensor]:
    """The weights as a layout reads them; the first one writes them."""
    from polyturn.trainer.megatron.torch_dist import save_torch_dist

    initial = directory if directory.exists() else None
    policy = _open(context, path, layout, "float32", initial_path=initial)
    try:
        if initial is None:
            save_torch_dist(policy._engine.chunks, directory, hf_directory=path, dtype="float32")
        return {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
    finally:
        policy.close()


def _open(context: RankContext, path: Path, layout: ParallelConfig, dtype: str, **settings: Any) -> Any:
    from tests.support.megatron.policies import make_policy

    return make_policy(
        path,
        parallel=layout,
        dtype=dtype,
        optimizer=SMOOTH,
        keep_reference=True,
        max_tokens_per_gpu=64 // layout.context,
        **settings,
        place=context.place,
    )


def _go_on(
    context: RankContext, policy: Any, own: list[TrainSample], samples: list[TrainSample]
) -> Continued:
    num_updates = policy.num_updates
    loaded = _weights(context, policy)
    metrics = _train(policy, own, samples, NUM_AFTER)
    return Continued(
        num_updates=num_updates, loaded=loaded, metrics=metrics, trained=_weights(context, policy)
    )


def _weights(context: RankContext, policy: Any) -> dict[str, torch.Tensor] | None:
    weights = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
    return weights if context.rank == 0 else None


def _train(
    policy: Any, own: list[TrainSample], samples: list[TrainSample], num_updates: int
) -> list[dict[str, float]]:
    temperature = OBJECTIVE.temperature
    columns = policy.logprobs(own, temperature=temperature)
    references = policy.reference_logprobs(own, temperature=temperature)
    scored = [
        replace(sample, proximal_logprobs=column, reference_logprobs=reference)
        for sample, column, reference in zip(own, columns, references, strict=True)
    ]
    counts = count_samples(samples)
    return [policy.train(scored, objective=OBJECTIVE, global_counts=counts) for _ in range(num_updates)]
