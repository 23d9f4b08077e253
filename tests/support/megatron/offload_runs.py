"""What a rank does in the tests of offloading: train, with and without its state going away between the updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.data.balance import split_over_ranks
from polyturn.trainer.data.samples import TrainSample, count_samples
from tests.support.megatron.layout_runs import SMOOTH
from tests.support.megatron.ranks_pool import RankContext

NUM_UPDATES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What one rank saw."""

    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    num_bytes: list[int]
    """That went to the host, by part and turn."""
    num_left: list[int]
    """Bytes of all that trains, by part, once it was away."""


def train_by_turns(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    settings: dict[str, Any],
    directory: Path,
) -> tuple[Trained, Trained]:
    """Three updates with a checkpoint after the last: with the state at rest between them, and with it away."""
    plain = _train(context.again(0), path, layout, samples, settings, None)
    return plain, _train(context.again(1), path, layout, samples, settings, directory)


def _train(
    context: RankContext,
    path: Path,
    layout: ParallelConfig,
    samples: list[TrainSample],
    settings: dict[str, Any],
    directory: Path | None,
) -> Trained:
    from polyturn.rollout.engines.checksums import tensor_checksum
    from polyturn.trainer.megatron.offload import OffloadedState
    from tests.support.megatron.policies import make_policy, save_checkpoint

    policy = make_policy(path, parallel=layout, optimizer=SMOOTH, **settings, place=context.place)
    try:
        state = OffloadedState([policy.engine])
        counts = count_samples(samples)
        own = split_over_ranks(samples, layout.data)[policy.data_parallel_rank]
        columns = policy.logprobs(own)
        own = [replace(sample, proximal_logprobs=column) for sample, column in zip(own, columns, strict=True)]
        trained = Trained(metrics=[], weights={}, num_bytes=[], num_left=[])
        for _ in range(NUM_UPDATES):
            trained.metrics.append(policy.train(own, objective=Objective(), global_counts=counts))
            if directory is None:
                continue
            before = {name: tensor.clone() for name, tensor in policy.named_hf_tensors()}
            trained.num_bytes.append(state.offload("training"))
            assert state.offload("training") == 0, "it is away already"
            trained.num_left.append(sum(_training_bytes(policy.engine)))
            for name, tensor in policy.named_hf_tensors():
                assert torch.equal(tensor, before[name]), f"{name} is sent while what trains it is away"
                # As a sync does, on what may be the weight itself.
                assert len(tensor_checksum(tensor)) == 16
            trained.num_bytes.append(state.offload("weights"))
            trained.num_left.append(sum(param.untyped_storage().nbytes() for param in _params(policy.engine)))
            assert state.is_away
            state.reload()
            state.reload()
            assert not state.is_away
        if directory is not None:
            save_checkpoint(policy, directory)
            policy.load_checkpoint(directory)
        trained.weights.update({name: tensor.clone() for name, tensor in policy.named_hf_tensors()})
        return trained
    finally:
        policy.close()


def _params(engine: Any) -> list[torch.Tensor]:
    return [param for chunk in engine.chunks for param in chunk.parameters()]


def _training_bytes(engine: Any) -> list[int]:
    """Of gradients, moments and, where they are not the model's own, the optimizer's weights."""
    tensors = [buffer.grad_data for buffer in engine.grad_buffers]
    weights = {param.untyped_storage().data_ptr() for param in _params(engine)}
    for optimizer in engine.optimizers:
        for group in optimizer.optimizer.param_groups:
            tensors += group["params"]
        for found in optimizer.optimizer.state.values():
            tensors += [value for value in found.values() if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return [storage.nbytes() for storage in storages if storage.data_ptr() not in weights]
