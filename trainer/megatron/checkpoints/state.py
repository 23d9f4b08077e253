"""What an engine has to keep: its share of the optimizer, its buffers, its random state.

The model's weights themselves are not kept: they are the optimizer's float32 weights, shared out after a load. Weights
that are not trained (a base model under adapters) are not kept either; they come from where the run got them.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from polyturn.trainer.megatron.checkpoints.boxes import Box

if TYPE_CHECKING:
    from polyturn.trainer.megatron.engine import Engine

WEIGHT = "param"
"""Megatron-core's name for the float32 weights among a parameter's states."""
BUFFER = "buffer"
RANDOM = "random."


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A range of one of this rank's tensors, and where it belongs in the global ones."""

    boxes: tuple[Box, ...]
    start: int
    end: int
    """The elements [start, end) of the flat tensor are this rank's."""
    states: Mapping[str, torch.Tensor]
    """By name (`param`, `exp_avg`, `exp_avg_sq`; `buffer`), each [end - start]."""
    owner: Any
    """The optimizer of a parameter; None: the state is a buffer."""
    tensor: torch.Tensor
    """The model's own tensor."""

    def same_place(self, other: tuple[tuple[Box, ...], int, int]) -> bool:
        return (self.boxes, self.start, self.end) == other


def sharding_metadata() -> dict[str, Any]:
    """What Megatron-core's `sharded_state_dict` wants to be told."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def sharded_tensors(chunks: Sequence[GPTModel]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """Every tensor of this rank's model that checkpoints know, as Megatron-core describes it."""
    for chunk in chunks:
        for value in nested_values(chunk.sharded_state_dict(metadata=sharding_metadata())):
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                yield value


def kept_state(engine: Engine) -> list[Kept]:
    """The live tensors of this rank, in an order that depends on the layout alone.

    Raises:
        ValueError: Megatron-core does not say where a trained parameter belongs.
    """
    described = {id(value.data): value for value in sharded_tensors(engine.chunks)}
    found = []
    for optimizer in engine.optimizers:
        for param in optimizer.model_param_group_index_map:
            owned = optimizer._get_model_param_range_map(param)["param"]
            size = owned.end - owned.start
            states = _states(optimizer, param)
            found.append(
                Kept(
                    boxes=_boxes(described.get(id(param)), param, split=True),
                    start=owned.start,
                    end=owned.end,
                    # A step count of a tensor's own is no state of its elements.
                    states={
                        name: state.detach().view(-1)
                        for name, state in states.items()
                        if state.dim() > 0 and state.numel() == size
                    },
                    owner=optimizer,
                    tensor=param,
                )
            )
    for value in described.values():
        if isinstance(value, ShardedTensor) and not isinstance(value.data, torch.nn.Parameter):
            buffer = value.data
            found.append(
                Kept(
                    boxes=_boxes(value, buffer),
                    start=0,
                    end=buffer.numel(),
                    states={BUFFER: buffer.detach().view(-1)},
                    owner=None,
                    tensor=buffer,
                )
            )
    return found


def _states(optimizer: Any, param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    shard = model_shard(optimizer, param)
    if shard is not None and not optimizer.optimizer.state.get(shard):
        # Before the first step there is nothing but the model's own weights.
        return {WEIGHT: shard.float()}
    return optimizer._get_main_param_and_optimizer_states(param)


def model_shard(optimizer: Any, param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's range of the model's own tensor, where the optimizer itself keeps the float32 weights of it."""
    if not optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return None
    group, position = optimizer.model_param_group_index_map[param]
    return optimizer.optimizer.param_groups[group]["params"][position]


def kept_weights(chunks: Sequence[GPTModel]) -> list[Kept]:
    """The weights and buffers of models that nobody trains, each whole."""
    return [
        Kept(
            boxes=_boxes(value, value.data),
            start=0,
            end=value.data.numel(),
            states={WEIGHT if isinstance(value.data, torch.nn.Parameter) else BUFFER: value.data.view(-1)},
            owner=None,
            tensor=value.data,
        )
        for value in sharded_tensors(chunks)
    ]


def _boxes(
    value: ShardedTensor | ShardedTensorFactory | None, tensor: torch.Tensor, *, split: bool = False
) -> tuple[Box, ...]:
    """Where a model's tensor belongs: one box, or two for gate and up projections in one tensor.

    `split`: the data-parallel ranks have ranges of it instead of copies, so each of theirs counts.
    """
    if value is None:
        raise ValueError(
            f"a trained parameter of shape {tuple(tensor.shape)} is not in the model's sharded_state_dict: "
            "it could not be loaded at another layout"
        )
    parts = [value] if isinstance(value, ShardedTensor) else list(nested_values(value.build()))
    boxes = []
    for part in parts:
        flat_start = part.data.storage_offset() - tensor.storage_offset()
        if not part.data.is_contiguous() or not 0 <= flat_start < max(tensor.numel(), 1):
            raise ValueError(f"{part.key}: its parts do not follow each other in memory")
        boxes.append(
            Box(
                key=part.key,
                global_shape=tuple(part.global_shape),
                offset=tuple(part.global_offset),
                shape=(1,) * part.prepend_axis_num + tuple(part.local_shape),
                flat_start=flat_start,
                padded=part.allow_shape_mismatch,
                main=_is_main(part.replica_id, split=split),
            )
        )
    return tuple(boxes)


def _is_main(replica_id: int | tuple[int, ...], *, split: bool) -> bool:
    """Whether this rank's copy counts, of those on other ranks. The last number is the data-parallel rank."""
    numbers = (replica_id,) if isinstance(replica_id, int) else replica_id
    return not any(numbers[:-1] if split else numbers)


def num_optimizer_steps(engine: Engine) -> int:
    """How often the optimizer was stepped. FusedAdam keeps it in the parameter groups, torch's AdamW, which steps what
    is offloaded to the CPU, beside each parameter's moments."""
    in_groups = [int(group.get("step", 0)) for group in _groups(engine)]
    return max([0, *in_groups, *(int(state["step"]) for state in _own_step_counts(engine))])


def prepare_optimizer(engine: Engine, num_steps: int) -> None:
    """Give every parameter the moments that `num_steps` updates leave, whatever their values, or none after 0."""
    for optimizer in engine.optimizers:
        if optimizer.optimizer is None:
            continue
        if num_steps == 0:
            optimizer.optimizer.state.clear()
        elif not optimizer.optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())
    for group in _groups(engine):
        if num_steps:
            group["step"] = num_steps
        else:
            group.pop("step", None)
    for state in _own_step_counts(engine):
        state["step"] = torch.full_like(state["step"], num_steps)


def finish_optimizer(engine: Engine) -> None:
    """Make restored state what is stepped: the weights of the model, and of an optimizer on the CPU."""
    for optimizer in engine.optimizers:
        take_over = getattr(optimizer.optimizer, "_sync_hdo_state_to_sub_optimizers", None)
        if take_over is not None:
            take_over()
    engine.share_params()


def _own_step_counts(engine: Engine) -> Iterator[dict[str, Any]]:
    """The states of parameters that have a step count of their own."""
    for optimizer in engine.optimizers:
        if optimizer.optimizer is not None:
            yield from (state for state in optimizer.optimizer.state.values() if "step" in state)


def _groups(engine: Engine) -> Iterator[dict[str, Any]]:
    for optimizer in engine.optimizers:
        if optimizer.optimizer is not None:
            yield from optimizer.optimizer.param_groups


def random_state() -> dict[str, torch.Tensor]:
    """The generators of this rank."""
    return {
        f"{RANDOM}cpu": torch.random.get_rng_state(),
        f"{RANDOM}device": torch.cuda.get_rng_state(),
        **{f"{RANDOM}tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def restore_random_state(tensors: Mapping[str, torch.Tensor]) -> None:
    """Set the generators to what `random_state` found."""
    tracker = f"{RANDOM}tracker."
    torch.random.set_rng_state(tensors[f"{RANDOM}cpu"])
    torch.cuda.set_rng_state(tensors[f"{RANDOM}device"])
    get_cuda_rng_tracker().set_states(
        {name.removeprefix(tracker): state for name, state in tensors.items() if name.startswith(tracker)}
    )
