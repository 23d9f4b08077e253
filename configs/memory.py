"""The memory that a config asks for, by its sizes alone. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from polyturn.configs.adapter_shape import adapter_parameters
from polyturn.configs.errors import ConfigError
from polyturn.configs.model_shape import ModelShape, RankParameters, Split
from polyturn.configs.parallel import ParallelConfig
from polyturn.configs.schema import RunConfig
from polyturn.configs.stages import StageSizes, stage_layers

BYTES = {"float32": 4, "bfloat16": 2}
STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
"""Of a number of the optimizer's state, by the names that `megatron.optimizer` takes."""
CPU_KV_TOKENS = 65536
"""The engine's KV pool on a CPU where `sglang.max_total_tokens` does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes by part; activations, the process itself and its libraries are not counted."""

    stages: tuple[dict[str, int], ...]
    """Of one trainer rank on each pipeline stage."""
    host: tuple[int, ...]
    """What such a rank keeps in its host's memory: the optimizer's state as far as it is offloaded, the reference."""
    engine: dict[str, int]
    """Of one tensor-parallel rank of an engine."""

    @property
    def rank(self) -> dict[str, int]:
        """Of the trainer rank that needs most."""
        return max(self.stages, key=lambda parts: sum(parts.values()))


def stage_parameters(
    shape: ModelShape, parallel: ParallelConfig, sizes: StageSizes | None = None
) -> list[RankParameters]:
    """Parameters on one rank of each pipeline stage; all ranks of a stage have as many.

    Args:
        sizes: those of the first and last stage that the user decided.

    Raises:
        ConfigError: the layers cannot be divided so.
    """
    stages = _layers_of_stages(shape, parallel, sizes)
    split = Split(tensor=parallel.tensor, expert=parallel.expert, expert_tensor=parallel.expert_tensor)
    return [
        shape.on_stage(layers, split, first=stage == 0, last=stage == parallel.pipeline - 1)
        for stage, layers in enumerate(stages)
    ]


def _layers_of_stages(
    shape: ModelShape, parallel: ParallelConfig, sizes: StageSizes | None
) -> list[list[int]]:
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    try:
        return stage_layers(shape.num_layers, parallel.pipeline, virtual, given=sizes)
    except ValueError as error:
        raise ConfigError(f"trainer.parallel: {error}") from error


def estimate_memory(config: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """The memory that the sizes in the config decide.

    With P parameters on a trainer rank of b bytes each (4 for float32, 2 for bfloat16): weights b·P, float32 gradients
    4·P, and of the distributed optimizer's state its share: Adam's two moments 8·P/d, and for bfloat16 the float32
    weights 4·P/d (fewer bytes with the dtypes of `megatron.optimizer`). d is the number of ranks that hold the same
    weights: data x context, and for experts the ranks of a stage divided by expert x expert_tensor. A frozen reference
    has weights b·P, which wait in the host's memory. With A parameters in adapters, gradients and optimizer are theirs,
    4·A and a share of 8·A or 12·A, beside their weights b·A, and the reference is the policy without them. A critic in
    the same processes has weights, gradients and optimizer of its own, but no output layer. Of the logits only a tile
    exists at a time.

    An engine holds weights b·P, split over its tensor-parallel ranks, and b bytes for each element of its KV pool.

    Raises:
        ConfigError: the model's layers cannot be divided among the pipeline stages.
    """
    size = BYTES[config.model.dtype]
    parallel = config.trainer.parallel
    copies = parallel.data * parallel.context
    expert_copies = parallel.tensor * copies // (parallel.expert * parallel.expert_tensor)
    state_bytes, share_offloaded = _optimizer_state(config)
    stages, host = [], []
    for stage, counts in enumerate(stage_parameters(shape, parallel, user_stage_sizes(config))):
        state = -(-state_bytes * counts.dense // copies) + -(-state_bytes * counts.experts // expert_copies)
        offloaded = round(share_offloaded * state)
        parts = {
            "weights": size * counts.total,
            "gradients": 4 * counts.total,
            "optimizer": state - offloaded,
        }
        if config.trainer.lora is not None:
            adapters = _adapter_parameters(config, shape, stage)
            offloaded = round(share_offloaded * state_bytes * adapters / copies)
            parts["adapters"] = size * adapters
            parts["gradients"] = 4 * adapters
            parts["optimizer"] = -(-state_bytes * adapters // copies) - offloaded
        elif config.trainer.algorithm.needs_reference and config.trainer.device == "cpu":
            parts["reference"] = size * counts.total
        elif config.trainer.algorithm.needs_reference:
            offloaded += size * counts.total
        if config.trainer.uses_critic and not config.trainer.critic_has_ranks:
            critic = counts.total - _output_parameters(config, shape, stage)
            parts["critic"] = (size + 4) * critic + state - state_bytes * (counts.total - critic) // copies
        stages.append(parts)
        host.append(offloaded)
    return MemoryEstimate(stages=tuple(stages), host=tuple(host), engine=_engine_memory(config, shape))


def _adapter_parameters(config: RunConfig, shape: ModelShape, stage: int) -> int:
    """Those of the adapters on one rank of a pipeline stage."""
    assert config.trainer.lora is not None
    layers = _layers_of_stages(shape, config.trainer.parallel, user_stage_sizes(config))[stage]
    return adapter_parameters(shape, config.trainer.lora, layers, tensor=config.trainer.parallel.tensor)


def _output_parameters(config: RunConfig, shape: ModelShape, stage: int) -> int:
    """Those of the output layer that one rank of a pipeline stage holds beside the embedding."""
    parallel = config.trainer.parallel
    if stage < parallel.pipeline - 1 or (shape.tied_embeddings and parallel.pipeline == 1):
        return 0
    return -(-shape.vocab_size // parallel.tensor) * shape.hidden_size


def _optimizer_state(config: RunConfig) -> tuple[int, float]:
    """Bytes for each parameter, and the share of them in the host's memory."""
    options = config.megatron.get("optimizer", {})
    kinds = ["exp_avg_dtype", "exp_avg_sq_dtype"]
    if config.model.dtype != "float32":
        kinds.append("main_params_dtype")
    state_bytes = sum(STATE_BYTES[options.get(kind, "float32")] for kind in kinds)
    offloads = bool(options.get("optimizer_cpu_offload"))
    return state_bytes, float(options.get("optimizer_offload_fraction", 0.0)) if offloads else 0.0


def check_layout(config: RunConfig, shape: ModelShape) -> None:
    """Whether the model can be laid out as `trainer.parallel` and `engines` say.

    Raises:
        ConfigError: heads, experts or layers cannot be divided so.
    """
    parallel = config.trainer.parallel
    if shape.num_heads % parallel.tensor or shape.num_kv_heads % parallel.tensor:
        raise ConfigError(
            f"trainer.parallel.tensor is {parallel.tensor}, which must divide the model's {shape.num_heads} attention "
            f"heads and {shape.num_kv_heads} key-value heads"
        )
    # An engine copies key-value heads where it has more ranks than them.
    tensor = config.engines.tensor_parallel
    if shape.num_heads % tensor or (shape.num_kv_heads % tensor and tensor % shape.num_kv_heads):
        raise ConfigError(
            f"engines.tensor_parallel is {tensor}, which must divide the model's {shape.num_heads} attention heads, "
            f"and divide its {shape.num_kv_heads} key-value heads or be divided by them"
        )
    num_experts = shape.experts.num_experts if shape.experts else 1
    if num_experts % parallel.expert:
        raise ConfigError(
            f"trainer.parallel.expert is {parallel.expert}, which must divide the model's {num_experts} experts"
            if shape.experts
            else f"trainer.parallel.expert is {parallel.expert}, but the model has no experts; set it to 1"
        )
    for axis, size, what in split_widths(shape):
        ranks = getattr(parallel, axis)
        if size % ranks:
            raise ConfigError(
                f"trainer.parallel.{axis} is {ranks}, which must divide the {size} channels of the model's {what}"
            )
    stage_parameters(shape, parallel, user_stage_sizes(config))


def split_widths(shape: ModelShape) -> Iterator[tuple[str, int, str]]:
    """Which axis splits which inner width: the axis, the width, what it is of."""
    experts = shape.experts
    if experts is None or not all(experts.layers):
        yield "tensor", shape.ffn_size, "MLP"
    if experts is not None:
        yield "expert_tensor", experts.ffn_size, "experts"
        yield "tensor", experts.shared_ffn_size, "shared experts"


def user_stage_sizes(config: RunConfig) -> StageSizes:
    """What the `megatron` section says of the first and the last pipeline stage."""
    return StageSizes(
        first=config.megatron.get("num_layers_in_first_pipeline_stage"),
        last=config.megatron.get("num_layers_in_last_pipeline_stage"),
    )


def _engine_memory(config: RunConfig, shape: ModelShape) -> dict[str, int]:
    size, tensor = BYTES[config.model.dtype], config.engines.tensor_parallel
    split = Split(tensor=tensor, expert_tensor=tensor)
    counts = shape.on_stage(range(shape.num_layers), split, first=True, last=True)
    parts = {"weights": size * counts.total}
    pool = config.sglang.get("max_total_tokens")
    if pool is None and config.engines.device == "cpu":
        pool = CPU_KV_TOKENS
    if isinstance(pool, int):
        parts["kv cache"] = size * pool * shape.cache_elements(tensor_parallel=tensor)
    return parts


def human_bytes(count: int) -> str:
    """Bytes with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
