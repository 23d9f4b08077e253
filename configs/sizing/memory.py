"""The memory that a config asks for, by its sizes alone. Nothing here needs torch.

What a rank takes while it computes is in `activations.py`, what trainer and engine have by turns in `turns.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.sglang_options import attention_parts, expert_parts
from polyturn.configs.schema.engines import ServersConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.activations import BYTES, working_bytes
from polyturn.configs.sizing.model_shape import (
    ModelShape,
    RankParameters,
    Split,
    StageSizes,
    adapter_parameters,
    stage_layers,
)

STATE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}
"""Of a number of the optimizer's state, by the names that `megatron.optimizer` takes."""
CPU_KV_TOKENS = 65536
"""The engine's KV pool on a CPU where `sglang.max_total_tokens` does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage."""

    parts: Mapping[str, int]
    """On its device, all the time: its state."""
    working: Mapping[str, int]
    """On its device beside it, while it computes."""
    host: int
    """In its host's memory beside a GPU: the optimizer's state as far as it is offloaded, the reference."""

    @property
    def total(self) -> int:
        """On its device, while it computes."""
        return sum(self.parts.values()) + sum(self.working.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes by part; what Python and its libraries take of a host's memory is not counted."""

    stages: tuple[RankMemory, ...]
    """One trainer rank on each pipeline stage."""
    critic: tuple[RankMemory, ...]
    """One rank of a critic with ranks of its own, on each of their pipeline stages."""
    engine: Mapping[str, int]
    """Of one tensor-parallel rank of an engine."""

    @property
    def rank(self) -> RankMemory:
        """The trainer rank that needs most."""
        return max(self.stages, key=lambda rank: rank.total)


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


def estimate_memory(
    config: RunConfig, shape: ModelShape, critic_shape: ModelShape | None = None
) -> MemoryEstimate:
    """The memory that the sizes in the config decide.

    Args:
        critic_shape: where the critic's model is not the policy's.

    With P parameters on a trainer rank of b bytes each (4 for float32, 2 for bfloat16): weights b·P, float32 gradients
    4·P, and of the distributed optimizer's state its share: Adam's two moments 8·P/d, and for bfloat16 the float32
    weights 4·P/d (fewer bytes with the dtypes of `megatron.optimizer`). d is the number of ranks that hold the same
    weights: data x context, and for experts the ranks of a stage divided by expert x expert_tensor. A frozen reference
    has weights b·P, which wait in the host's memory. With A parameters in adapters, gradients and optimizer are theirs,
    4·A and a share of 8·A or 12·A, beside their weights b·A, and the reference is the policy without them. A critic has
    weights, gradients and optimizer of its own, but no output layer, in the same processes or in others. Gradients
    are b·P where `megatron.ddp.grad_reduce_in_fp32` is false.

    An engine holds weights b·P, split over its tensor-parallel ranks, and b bytes for each element of its KV pool. With
    block-quantised weights, those of the layers take 1 byte each and 4 for a block of 128 x 128.

    Raises:
        ConfigError: the model's layers cannot be divided among the pipeline stages.
    """
    stages = []
    sizes = user_stage_sizes(config)
    layers = _layers_of_stages(shape, config.trainer.parallel, sizes)
    for stage, counts in enumerate(stage_parameters(shape, config.trainer.parallel, sizes)):
        parts, host = _trained(config, counts, config.trainer.parallel)
        if config.trainer.lora is not None:
            parts, host = _with_adapters(config, parts["weights"], _adapter_parameters(config, shape, stage))
        elif config.trainer.needs_reference and config.trainer.device == "cpu":
            parts["reference"] = parts["weights"]
        elif config.trainer.needs_reference:
            host += parts["weights"]
        if config.trainer.uses_critic and not config.trainer.critic_has_ranks:
            critic, critic_host = _trained(
                config,
                _without_output(config.trainer.parallel, shape, stage, counts),
                config.trainer.parallel,
            )
            parts["critic"] = sum(critic.values())
            host += critic_host
        if config.shares_gpus and config.trainer.device == "cuda":
            # Where it is in the engines' turn.
            host += sum(size for part, size in parts.items() if part != "gradients")
        working = working_bytes(config, shape, layers[stage], stage=stage)
        stages.append(RankMemory(parts=parts, working=working, host=host))
    return MemoryEstimate(
        stages=tuple(stages),
        critic=tuple(_critic_ranks(config, critic_shape or shape)),
        engine=engine_memory(
            shape,
            servers=config.engines,
            dtype=config.model.dtype,
            sglang=config.sglang,
            in_fp8=config.weight_sync.dtype == "fp8_block",
        ),
    )


def _critic_ranks(config: RunConfig, shape: ModelShape) -> Iterator[RankMemory]:
    if not config.trainer.critic_has_ranks:
        return
    trainer, critic = config.trainer, config.trainer.critic
    parallel = critic.parallel
    of_critic = {
        "parallel": parallel,
        "max_tokens_per_gpu": critic.max_tokens_per_gpu or trainer.max_tokens_per_gpu,
    }
    own = config.model_copy(update={"trainer": trainer.model_copy(update=of_critic)})
    layers = _layers_of_stages(shape, parallel, None)
    for stage, counts in enumerate(stage_parameters(shape, parallel)):
        parts, host = _trained(config, _without_output(parallel, shape, stage, counts), parallel)
        working = working_bytes(own, shape, layers[stage], stage=stage)
        # One number for each token takes nothing.
        working.pop("head", None)
        yield RankMemory(parts=parts, working=working, host=host)


def _trained(
    config: RunConfig, counts: RankParameters, parallel: ParallelConfig
) -> tuple[dict[str, int], int]:
    """Weights, gradients and the share of the optimizer's state on a rank's device, and the state on its host."""
    copies = parallel.data * parallel.context
    expert_copies = parallel.tensor * copies // (parallel.expert * parallel.expert_tensor)
    state_bytes, share_offloaded = _optimizer_state(config)
    state = -(-state_bytes * counts.dense // copies) + -(-state_bytes * counts.experts // expert_copies)
    offloaded = round(share_offloaded * state)
    parts = {
        "weights": BYTES[config.model.dtype] * counts.total,
        "gradients": _gradient_bytes(config) * counts.total,
        "optimizer": state - offloaded,
    }
    return parts, offloaded


def _with_adapters(config: RunConfig, weights: int, adapters: int) -> tuple[dict[str, int], int]:
    """The same where adapters alone are trained."""
    state_bytes, share_offloaded = _optimizer_state(config)
    copies = config.trainer.parallel.data * config.trainer.parallel.context
    offloaded = round(share_offloaded * state_bytes * adapters / copies)
    parts = {
        "weights": weights,
        "gradients": _gradient_bytes(config) * adapters,
        "optimizer": -(-state_bytes * adapters // copies) - offloaded,
        "adapters": BYTES[config.model.dtype] * adapters,
    }
    return parts, offloaded


def _gradient_bytes(config: RunConfig) -> int:
    reduced_whole = config.megatron.get("ddp", {}).get("grad_reduce_in_fp32", True)
    return 4 if reduced_whole else BYTES[config.model.dtype]


def _adapter_parameters(config: RunConfig, shape: ModelShape, stage: int) -> int:
    """Those of the adapters on one rank of a pipeline stage."""
    assert config.trainer.lora is not None
    layers = _layers_of_stages(shape, config.trainer.parallel, user_stage_sizes(config))[stage]
    return adapter_parameters(shape, config.trainer.lora, layers, tensor=config.trainer.parallel.tensor)


def _without_output(
    parallel: ParallelConfig, shape: ModelShape, stage: int, counts: RankParameters
) -> RankParameters:
    """A critic's parameters: without the output layer that a rank of the last stage holds beside the embedding."""
    if stage < parallel.pipeline - 1 or (shape.tied_embeddings and parallel.pipeline == 1):
        return counts
    table = -(-shape.vocab_size // parallel.tensor) * shape.hidden_size
    return RankParameters(dense=counts.dense - table, experts=counts.experts)


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
    fault = shape.explain_heads(parallel.tensor)
    if fault is not None:
        raise ConfigError(f"trainer.parallel.tensor is {parallel.tensor}, which {fault}")
    lora = config.trainer.lora
    shares_heads = shape.latent is None and parallel.tensor > shape.num_kv_heads
    if lora is not None and shares_heads and any(lora.adapts(f"{name}_proj") for name in "qkv"):
        raise ConfigError(
            f"trainer.lora adapts queries, keys and values, which does not go with trainer.parallel.tensor "
            f"{parallel.tensor} above the model's {shape.num_kv_heads} key-value heads: take fewer ranks, or leave "
            "q_proj, k_proj and v_proj out of trainer.lora.target_modules"
        )
    # An engine copies key-value heads where it has more ranks than them.
    check_engine_layout(config.engines, shape, section="engines", sglang=config.sglang)
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
    _check_recomputing(config, shape)


def check_engine_layout(
    servers: ServersConfig, shape: ModelShape, *, section: str, sglang: Mapping[str, Any]
) -> None:
    """Whether an engine's ranks can share the model's heads and experts. Raises ConfigError, which names the section.

    Args:
        sglang: further arguments of these engines.
    """
    tensor, parts = servers.tensor_parallel, attention_parts(sglang)
    for key, size in (("attn_dp_size", parts), ("ep_size", expert_parts(sglang))):
        if size < 1 or tensor % size:
            raise ConfigError(f"sglang.{key} is {size}, which must divide {section}.tensor_parallel={tensor}")
    # The ranks of one part of the attention share its heads.
    ranks = tensor // parts
    if shape.num_heads % ranks or (shape.num_kv_heads % ranks and ranks % shape.num_kv_heads):
        over = "" if parts == 1 else f", over sglang.attn_dp_size={parts} parts {ranks} ranks each"
        raise ConfigError(
            f"{section}.tensor_parallel is {tensor}{over}, which must divide the model's {shape.num_heads} attention "
            f"heads, and divide its {shape.num_kv_heads} key-value heads or be divided by them"
        )


def _check_recomputing(config: RunConfig, shape: ModelShape) -> None:
    """Options of the section `megatron` that are right by themselves, against the model and the layout."""
    section, parallel = config.megatron, config.trainer.parallel
    count = section.get("recompute_num_layers")
    if section.get("recompute_granularity") == "full" and section.get("recompute_method") == "uniform":
        for layers in _layers_of_stages(shape, parallel, user_stage_sizes(config)):
            chunk = len(layers) // parallel.virtual_pipeline
            if count and chunk % count:
                raise ConfigError(
                    f"megatron.recompute_num_layers is {count}, which must divide the {chunk} layers of every pipeline "
                    "stage where recompute_method is uniform; use 1, or recompute_method: block"
                )
    modules = section.get("recompute_modules") or ()
    for module, is_there, what in (
        ("moe_act", shape.experts is not None, "experts"),
        ("mla_up_proj", shape.latent is not None, "latent attention"),
    ):
        if section.get("recompute_granularity") == "selective" and module in modules and not is_there:
            raise ConfigError(f"megatron.recompute_modules names {module}, but the model has no {what}")
    if section.get("distribute_saved_activations") and parallel.tensor > 1:
        raise ConfigError(
            "megatron.distribute_saved_activations does not go with trainer.parallel.tensor above 1, whose ranks share "
            "the sequence already"
        )
    if section.get("cpu_offloading") and parallel.pipeline > 1:
        raise ConfigError("megatron.cpu_offloading does not go with trainer.parallel.pipeline above 1")
    offloaded = section.get("cpu_offloading_num_layers", 0)
    if section.get("cpu_offloading") and not 0 <= offloaded < shape.num_layers:
        raise ConfigError(
            f"megatron.cpu_offloading_num_layers is {offloaded}, which must be below the model's {shape.num_layers} "
            "layers"
        )


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


def engine_memory(
    shape: ModelShape,
    *,
    servers: ServersConfig,
    dtype: str,
    sglang: Mapping[str, Any],
    in_fp8: bool = False,
) -> dict[str, int]:
    """Bytes by part of one tensor-parallel rank of engines that serve a model."""
    size, tensor = BYTES[dtype], servers.tensor_parallel
    split = Split(tensor=tensor, expert_tensor=tensor)
    whole = shape.on_stage(range(shape.num_layers), split, first=True, last=True).total
    layers = shape.on_stage(range(shape.num_layers), split, first=False, last=False).total
    parts = {"weights": size * whole}
    if in_fp8:
        parts["weights"] = size * (whole - layers) + layers + 4 * layers // 128**2
    pool = sglang.get("max_total_tokens")
    if pool is None and servers.device == "cpu":
        pool = CPU_KV_TOKENS
    if isinstance(pool, int):
        parts["kv cache"] = pool * size * shape.cache_elements(tensor_parallel=tensor)
    return parts


def token_bytes(config: RunConfig, shape: ModelShape) -> int:
    """What one token takes in the KV pool of one rank of an engine."""
    return BYTES[config.model.dtype] * shape.cache_elements(tensor_parallel=config.engines.tensor_parallel)


def human_bytes(count: int) -> str:
    """Bytes with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
