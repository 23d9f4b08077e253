"""Micro-batches through the pipeline stages, and what the last stage found, back on all of them.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Any],
    step: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run every micro-batch through all stages, with Megatron-core's schedule for this layout.

    Args:
        chunks: this rank's, wrapped.
        step: (iterator of the micro-batches, chunk) -> (output, function of it), called once for each chunk and
            micro-batch. On the last stage the function gives (loss, a count, what to return), or what to return when
            there is no backward pass.

    Returns:
        What the functions gave, by micro-batch; on the last stage only, elsewhere nothing.
    """
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        # Lengths vary, and the stages tell each other: these two are read by nobody.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def no_sync(chunks: Sequence[Any]) -> Any:
    """What the schedules call so that gradients are reduced with a chunk's last micro-batch alone.

    Without overlap they are reduced when all is done, and nothing needs to be held back.
    """
    if not chunks[0].ddp_config.overlap_grad_reduce:
        return None
    return [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync


def is_last_stage() -> bool:
    """Whether this rank holds the output layer."""
    return parallel_state.is_pipeline_last_stage()


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last stage's tensor, written into those of the other stages, which are of the same shape and type."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, group_src=group.size() - 1, group=group)
    return tensor


def object_from_last_stage(value: Any) -> Any:
    """The last stage's object; what the others hold does not matter."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, group_src=group.size() - 1, group=group)
    return holder[0]
