"""Whether the memory that a config asks for is there, what does not fit, and what would.

The estimate counts what the sizes decide and little else, so what does not fit by it does not fit at all. What fits
leaves the rest to an allocator's gaps, and on an engine's GPU to the KV pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.hardware import GPU_GIB
from polyturn.configs.sizing.memory import (
    MemoryEstimate,
    check_layout,
    estimate_memory,
    human_bytes,
    token_bytes,
)
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.served import served_memory
from polyturn.configs.sizing.turns import turn_memory

GIB = 1 << 30
TIGHT = 0.85
"""Of a device, taken by what is counted: more leaves too little for what is not."""
TIGHT_RANK = 0.95
"""The same of a trainer's rank, of which activations are counted, too."""
POWERS = (1, 2, 4, 8, 16, 32, 64)
MAX_GPUS = 1024
"""Of a layout that is proposed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What there is. None: not known."""

    gpu: int | None
    """Bytes of one GPU."""
    gpu_name: str
    host: int | None
    """Bytes of the one host that everything runs on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """One thing that takes memory of one device."""

    what: str
    bytes: int
    advice: str
    """What would fit, found only where it does not."""
    of_host: bool = False
    tight: float = TIGHT
    """Of the device, from where on too little is left."""


def named_capacity(config: RunConfig) -> Capacity:
    """Of the GPU that `cluster.gpu` names; where it names none, of the largest there is."""
    if config.cluster.gpu is not None:
        return Capacity(gpu=GPU_GIB[config.cluster.gpu] * GIB, gpu_name=config.cluster.gpu, host=None)
    name, size = max(GPU_GIB.items(), key=lambda item: item[1])
    return Capacity(gpu=size * GIB, gpu_name=f"the largest GPU known, {name}", host=None)


def judge(
    config: RunConfig, shape: ModelShape, capacity: Capacity, critic_shape: ModelShape | None = None
) -> tuple[list[str], list[str]]:
    """What does not fit, and what fits barely: a sentence each.

    Args:
        critic_shape: where the critic's model is not the policy's.
    """
    misfits, tight = [], []
    for need in _needs(config, shape, critic_shape):
        have = capacity.host if need.of_host else capacity.gpu
        where = "this machine" if need.of_host else capacity.gpu_name
        if have is None or need.bytes <= need.tight * have:
            continue
        shown = f"{need.what}: {human_bytes(need.bytes)} of the {human_bytes(have)} of {where}"
        if need.bytes <= have:
            tight.append(f"{shown}, which leaves little for what is not counted")
        else:
            misfits.append(f"{shown}{_advice(config, shape, need, have)}")
    if config.shares_gpus and config.trainer.device == "cuda" and capacity.gpu is not None:
        misfits += _turn_misfits(config, shape, capacity, critic_shape)
    return misfits, tight


def _turn_misfits(
    config: RunConfig, shape: ModelShape, capacity: Capacity, critic_shape: ModelShape | None
) -> Iterator[str]:
    """Of GPUs that engines and trainer share; what is too much for either alone has been said."""
    assert capacity.gpu is not None
    estimate = estimate_memory(config, shape, critic_shape)
    alone = max(estimate.rank.total, _engine_bytes(config, shape, estimate))
    for turn in turn_memory(config, shape, estimate, gpu=capacity.gpu):
        if turn.total > capacity.gpu and alone <= capacity.gpu:
            largest = max(turn.parts, key=lambda part: turn.parts[part])
            yield (
                f"engines.placement=shared: {turn.name} takes {human_bytes(turn.total)} of the "
                f"{human_bytes(capacity.gpu)} of {capacity.gpu_name}, of which {largest} "
                f"{human_bytes(turn.parts[largest])}; try {turn.advice}"
            )


def _needs(config: RunConfig, shape: ModelShape, critic_shape: ModelShape | None) -> Iterator[Need]:
    estimate = estimate_memory(config, shape, critic_shape)
    on_gpu = config.trainer.device == "cuda"
    if on_gpu:
        yield Need(what="a trainer rank takes", bytes=estimate.rank.total, advice="trainer", tight=TIGHT_RANK)
        if estimate.critic:
            most = max(rank.total for rank in estimate.critic)
            yield Need(what="a critic rank takes", bytes=most, advice="critic", tight=TIGHT_RANK)
    if config.engines.device == "cuda":
        yield Need(what="an engine rank takes", bytes=_engine_bytes(config, shape, estimate), advice="engine")
    for served in served_memory(config):
        if served.model.engines.device == "cuda":
            yield Need(
                what=f"an engine rank of {served.model.name} takes", bytes=served.total, advice="served"
            )
    yield Need(
        what="all processes together take", bytes=host_bytes(config, estimate), advice="host", of_host=True
    )


def _engine_bytes(config: RunConfig, shape: ModelShape, estimate: MemoryEstimate) -> int:
    """Weights and the KV pool, which holds one episode at least."""
    one = config.environment.max_tokens_per_episode * token_bytes(config, shape)
    return estimate.engine["weights"] + max(one, estimate.engine.get("kv cache", 0))


def host_bytes(config: RunConfig, estimate: MemoryEstimate) -> int:
    """Of the memory of one host on which everything runs."""
    on_gpu = config.trainer.device == "cuda"
    total = 0
    for ranks, parallel in (
        (estimate.stages, config.trainer.parallel),
        (estimate.critic, config.trainer.critic.parallel),
    ):
        of_a_stage = parallel.world_size // parallel.pipeline
        total += of_a_stage * sum(rank.host + (0 if on_gpu else rank.total) for rank in ranks)
    if config.engines.device == "cpu":
        total += config.engines.num_engines * config.engines.tensor_parallel * sum(estimate.engine.values())
    return total + sum(
        served.num_ranks * served.total
        for served in served_memory(config)
        if served.model.engines.device == "cpu"
    )


def _advice(config: RunConfig, shape: ModelShape, need: Need, have: int) -> str:
    """What would fit, to be put behind the sentence that says what does not."""
    if need.advice == "engine":
        return _engine_advice(config, shape, have)
    if need.advice == "served":
        return "; give its engines more tensor_parallel"
    if need.advice == "host":
        return "; use a smaller model, fewer ranks or engines, or model.dtype=bfloat16"
    if need.advice == "critic":
        return "; give trainer.critic.parallel more tensor or pipeline"
    found = smallest_layout(config, shape, have)
    if found is None:
        return (
            f"; no layout on up to {MAX_GPUS} of them fits: move the optimizer to the hosts (megatron.optimizer."
            "optimizer_cpu_offload), or train adapters (trainer.lora)"
        )
    axes = {axis: size for axis, size in found.model_dump().items() if size > 1}
    shown = ", ".join(f"{axis}: {size}" for axis, size in axes.items())
    return f"; trainer.parallel={{{shown}}} fits, on {found.world_size} of them"


def _engine_advice(config: RunConfig, shape: ModelShape, have: int) -> str:
    others = () if config.serves_adapters else ("fp8_block",)
    for dtype in dict.fromkeys((config.weight_sync.dtype, *others)):
        for tensor in POWERS:
            if tensor > config.cluster.gpus_per_node:
                break
            changed = _changed(config, engines={"tensor_parallel": tensor}, weight_sync={"dtype": dtype})
            if _is_valid(changed, shape) and _fits_engine(changed, shape, have):
                with_dtype = "" if dtype == config.weight_sync.dtype else " with weight_sync.dtype=fp8_block"
                return f"; engines.tensor_parallel={tensor}{with_dtype} fits"
    return f"; it fits on none of a node's {config.cluster.gpus_per_node} GPUs however it is split"


def _fits_engine(config: RunConfig, shape: ModelShape, have: int) -> bool:
    return _engine_bytes(config, shape, estimate_memory(config, shape)) <= TIGHT * have


def smallest_layout(config: RunConfig, shape: ModelShape, have: int) -> ParallelConfig | None:
    """The layout of the trainer on the fewest GPUs that leaves room for activations, of those in powers of two."""
    sizes = [size for size in POWERS if size <= config.cluster.gpus_per_node]
    context = config.trainer.parallel.context
    stages = [stage for stage in POWERS if stage <= shape.num_layers]
    experts = POWERS if shape.experts is not None else (1,)
    layouts = []
    for tensor, pipeline, expert, data in product(sizes, stages, experts, POWERS):
        try:
            layouts.append(
                ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, data=data, context=context)
            )
        except ValidationError:
            continue
    layouts.sort(key=lambda layout: (layout.world_size, layout.pipeline, layout.tensor, layout.expert))
    for layout in layouts:
        if layout.world_size > MAX_GPUS or layout.data > config.trainer.global_batch_size:
            continue
        changed = _changed(config, trainer={"parallel": layout})
        if _is_valid(changed, shape) and estimate_memory(changed, shape).rank.total <= TIGHT_RANK * have:
            return layout
    return None


def _is_valid(config: RunConfig, shape: ModelShape) -> bool:
    try:
        check_layout(config, shape)
    except ConfigError:
        return False
    return True


def _changed(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    changes = {
        name: getattr(config, name).model_copy(update=dict(values)) for name, values in sections.items()
    }
    return config.model_copy(update=changes)
