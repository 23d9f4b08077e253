"""The process groups of a rank: how they are formed, and how the ranks that form one copy of a model share it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.megatron.cpu import check_device
from polyturn.trainer.weight_sync.process_group import open_store

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which rank a process is, and where the ranks meet."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"
    """Of rank 0, which listens at `port`; both are of no meaning for a single rank."""
    port: int = 0


def join_ranks(parallel: ParallelConfig, place: Place, *, device: str, seed: int) -> None:
    """Meet the other ranks and form the groups.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl).

    Raises:
        ValueError: the layout does not give as many ranks as there are, this process is a rank already, or was made
            for the other device.
    """
    check_device(device)
    if parallel.world_size != place.world_size:
        raise ValueError(
            f"the layout {parallel.describe()} has {parallel.world_size} rank(s), but {place.world_size} were started: "
            "set tensor x context x data x pipeline to that number"
        )
    if dist.is_initialized():
        raise ValueError("this process is a rank already: close its MegatronPolicy first")
    if device == "cuda":
        torch.cuda.set_device(place.rank % torch.cuda.device_count())
    backend = "nccl" if device == "cuda" else "gloo"
    if place.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        store = open_store(
            address=place.address,
            port=place.port,
            world_size=place.world_size,
            rank=place.rank,
            timeout=TIMEOUT,
        )
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=TIMEOUT
        )
    form_groups(parallel, rank=place.rank)
    model_parallel_cuda_manual_seed(seed)


def form_groups(parallel: ParallelConfig, *, rank: int) -> None:
    """Megatron-core's groups of a layout. The process group must be up."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline
        if parallel.virtual_pipeline > 1
        else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # The order that `ParallelConfig.place` counts in.
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    assert parallel_state.get_data_parallel_rank() == parallel.place(rank).data


def raise_on_all(fault: str | None) -> None:
    """Raise what any rank found, on all of them: one that went on alone would wait for ever. Collective.

    Raises:
        ValueError: the fault of the first rank that has one.
    """
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fault)
    for sentence in found:
        if sentence is not None:
            raise ValueError(sentence)


def leave_ranks() -> None:
    """Take the groups down, if there are any, so that this process can become a rank again."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLayout:
    """Sizes of Megatron-core's groups; data parallelism, which copies, is none of them."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    """Stages that each pipeline rank holds; None: one, without interleaving."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @classmethod
    def current(cls) -> Self:
        """Of the groups that are up."""
        return cls(
            tensor=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
            virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            context=parallel_state.get_context_parallel_world_size(),
            expert=parallel_state.get_expert_model_parallel_world_size(),
            expert_tensor=parallel_state.get_expert_tensor_parallel_world_size(),
        )
