"""What a config asks for, in numbers: the batch, the placement and the memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from polyturn.configs.errors import ConfigError
from polyturn.configs.models import ModelShape
from polyturn.configs.schema import RunConfig

BYTES = {"float32": 4, "bfloat16": 2}
CPU_KV_TOKENS = 65536
"""The engine's KV pool on a CPU where `sglang.max_total_tokens` does not say."""


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
    if rollout.samples_per_prompt == 1:
        raise ConfigError(
            "rollout.samples_per_prompt is 1, but a group of one episode has no baseline and trains nothing; "
            "use at least 2"
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
    rows = [Placed(name="router", device="cpu", note=f"port {engines.router.port or 'free'}")]
    for index in range(engines.num_engines):
        port = engines.port + index if engines.port else "free"
        rows.append(
            Placed(
                name=f"engine {index}",
                device=_devices(engines.device, engines.tensor_parallel),
                note=f"tensor {engines.tensor_parallel}, port {port}",
            )
        )
    for rank in range(trainer.parallel.world_size):
        data, tensor = divmod(rank, trainer.parallel.tensor)
        threads = f", {trainer.threads_per_rank} thread(s)" if trainer.device == "cpu" else ""
        rows.append(
            Placed(
                name=f"trainer rank {rank}",
                device=_devices(trainer.device, 1),
                note=f"tensor {tensor}, data {data}{threads}",
            )
        )
    return rows


def num_gpus(config: RunConfig) -> int:
    """GPUs that the run needs: engines and trainer ranks have their own."""
    engines, trainer = config.engines, config.trainer
    for_engines = engines.num_engines * engines.tensor_parallel if engines.device == "cuda" else 0
    return for_engines + (trainer.parallel.world_size if trainer.device == "cuda" else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes by part; activations, the process itself and its libraries are not counted."""

    rank: dict[str, int]
    """One trainer rank."""
    engine: dict[str, int]
    """One tensor-parallel rank of an engine."""


def estimate_memory(config: RunConfig, shape: ModelShape) -> MemoryEstimate:
    """The memory that the sizes in the config decide.

    With P parameters on a tensor-parallel rank, b bytes each (4 for float32, 2 for bfloat16) and d
    data-parallel ranks, a trainer rank holds weights b·P, float32 gradients 4·P, and of the distributed
    optimizer's state its share: Adam's two moments 8·P/d, and for bfloat16 the float32 weights 4·P/d. The
    logits of one micro-batch of n tokens and their gradients are 8·n·V/t, and a KL penalty adds the frozen
    reference's weights b·P.

    An engine holds weights b·P, and for each token of its KV pool 2·b·L·D·K/t bytes (keys and values of L
    layers, K key-value heads of D; at least one head a rank).
    """
    size = BYTES[config.model.dtype]
    tensor, data = config.trainer.parallel.tensor, config.trainer.parallel.data
    parameters = shape.parameters_per_rank(tensor_parallel=tensor)
    state_bytes = 8 if config.model.dtype == "float32" else 12
    rank = {
        "weights": size * parameters,
        "gradients": 4 * parameters,
        "optimizer": -(-state_bytes * parameters // data),
        "logits": 8 * config.trainer.max_tokens_per_gpu * -(-shape.vocab_size // tensor),
    }
    if config.trainer.algorithm.needs_reference:
        rank["reference"] = size * parameters
    engine_tensor = config.engines.tensor_parallel
    engine = {"weights": size * shape.parameters_per_rank(tensor_parallel=engine_tensor)}
    pool = config.sglang.get("max_total_tokens")
    if pool is None and config.engines.device == "cpu":
        pool = CPU_KV_TOKENS
    if isinstance(pool, int):
        heads = max(1, shape.num_kv_heads // engine_tensor)
        engine["kv cache"] = 2 * size * shape.num_layers * shape.head_dim * heads * pool
    return MemoryEstimate(rank=rank, engine=engine)


def num_cores() -> int:
    """Cores that this process may use."""
    # Not every system can say which; macOS cannot.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def human_bytes(count: int) -> str:
    """Bytes with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _devices(device: str, num_gpus: int) -> str:
    return "cpu" if device == "cpu" else f"{num_gpus} GPU(s)"
