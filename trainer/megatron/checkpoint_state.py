"""What an engine has to keep (weights, moments, buffers, random state), and which part of each tensor a rank holds.

Tensor, pipeline and expert parallelism give a rank a box of a global tensor; the distributed optimizer gives it a
range of that box's elements, counted row by row. A range of a box is a handful of smaller boxes, and boxes are easy to
intersect: that is all it takes to load what one layout wrote into another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from polyturn.trainer.megatron.engine import Engine

FILE_PREFIX = "rank-"


def file_name(rank: int, world_size: int) -> str:
    """Of a rank's file in the checkpoints that so many ranks write."""
    return f"{FILE_PREFIX}{rank:05d}-of-{world_size:05d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A box of a global tensor, and where its elements lie in a rank's flat tensor."""

    key: str
    """The global tensor's name."""
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Of its first element in the global tensor."""
    shape: tuple[int, ...]
    """As many dimensions as the global tensor has."""
    flat_start: int
    """Where its first element lies in the rank's flat tensor; the others follow row by row."""
    padded: bool
    """The global tensor's size depends on the layout (a padded vocabulary): what no rank wrote is zero."""
    main: bool
    """Of several ranks that hold the same box, the one whose copy counts."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def as_json(self) -> list[Any]:
        """The fields in their order, as `from_json` takes them."""
        return [
            self.key,
            list(self.global_shape),
            list(self.offset),
            list(self.shape),
            self.flat_start,
            self.padded,
            self.main,
        ]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Box:
        key, global_shape, offset, shape, flat_start, padded, main = fields
        return cls(
            key=key,
            global_shape=tuple(global_shape),
            offset=tuple(offset),
            shape=tuple(shape),
            flat_start=flat_start,
            padded=padded,
            main=main,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slab:
    """A box of a global tensor whose elements follow each other in some flat tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    flat_start: int


def slabs(box: Box, start: int, end: int) -> Iterator[Slab]:
    """The elements [start, end) of a rank's flat tensor that belong to `box`, as slabs of the global tensor.

    `flat_start` of a slab counts from `start`, for the range is what the rank stores.
    """
    first = max(start, box.flat_start) - box.flat_start
    last = min(end, box.flat_start + box.num_elements) - box.flat_start
    if first >= last:
        return
    for offset, shape, flat in _split_range(box.shape, first, last):
        yield Slab(
            offset=tuple(a + b for a, b in zip(box.offset, offset, strict=True)),
            shape=shape,
            flat_start=box.flat_start + flat - start,
        )


def _split_range(
    shape: tuple[int, ...], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """A range of a box's elements as boxes (offset, shape, first element): at most two for each dimension and one.

    Of a box [4, 5], the range [3, 17) is the end of row 0, rows 1 and 2, and the beginning of row 3.
    """
    if not shape:
        yield (), (), first
        return
    row = math.prod(shape[1:])
    if row == 0:
        return
    while first < last:
        index, within = divmod(first, row)
        if within == 0 and last - first >= row:
            num_rows = (last - first) // row
            zeros = (0,) * (len(shape) - 1)
            yield (index, *zeros), (num_rows, *shape[1:]), first
            first += num_rows * row
            continue
        stop = min(last, (index + 1) * row)
        for offset, part, flat in _split_range(shape[1:], within, stop - index * row):
            yield (index, *offset), (1, *part), index * row + flat
        first = stop


def overlap(ours: Slab, theirs: Slab) -> bool:
    """Whether two slabs of one tensor have elements in common."""
    low, high = _common(ours, theirs)
    return all(a < b for a, b in zip(low, high, strict=True))


def copy_shared(target: torch.Tensor, ours: Slab, source: torch.Tensor, theirs: Slab) -> int:
    """Copy what both slabs hold from the flat tensor `source` into the flat tensor `target`; the elements copied."""
    if not overlap(ours, theirs):
        return 0
    low, high = _common(ours, theirs)
    _window(target, ours, low, high).copy_(_window(source, theirs, low, high))
    return math.prod(b - a for a, b in zip(low, high, strict=True))


def _common(ours: Slab, theirs: Slab) -> tuple[list[int], list[int]]:
    """The first and the end of what both hold, by dimension."""
    low = [max(a, b) for a, b in zip(ours.offset, theirs.offset, strict=True)]
    high = [
        min(a + n, b + m)
        for a, n, b, m in zip(ours.offset, ours.shape, theirs.offset, theirs.shape, strict=True)
    ]
    return low, high


def _window(flat: torch.Tensor, slab: Slab, low: Sequence[int], high: Sequence[int]) -> torch.Tensor:
    view = flat[slab.flat_start : slab.flat_start + math.prod(slab.shape)].view(slab.shape)
    return view[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, slab.offset, strict=True))]


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
