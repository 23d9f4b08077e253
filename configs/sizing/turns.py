"""What a GPU holds that a trainer's rank and an engine share by turns (`trainer/run/turns.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.weight_sync import BroadcastSync
from polyturn.configs.sizing.activations import BYTES, CONTEXT_BYTES, GROUP_BYTES, library_bytes
from polyturn.configs.sizing.hardware import SHARED_MEM_FRACTION
from polyturn.configs.sizing.memory import MemoryEstimate
from polyturn.configs.sizing.model_shape import ModelShape

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnMemory:
    """Bytes by part of one GPU."""

    name: str
    parts: Mapping[str, int]
    advice: str
    """What to change where it does not fit."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def turn_memory(
    config: RunConfig, shape: ModelShape, estimate: MemoryEstimate, *, gpu: int
) -> Iterator[TurnMemory]:
    """The three states that follow each other; at no time are both whole.

    Args:
        gpu: bytes of one.
    """
    rank, engine = estimate.rank, estimate.engine
    of_engine = CONTEXT_BYTES + (GROUP_BYTES if config.engines.tensor_parallel > 1 else 0)
    of_trainer = library_bytes(config.trainer.parallel)
    yield TurnMemory(
        name="the trainer's turn",
        parts={**rank.parts, **rank.working, "engine's libraries": of_engine},
        advice="a smaller trainer.max_tokens_per_gpu, megatron.recompute_granularity: full, or more of "
        "trainer.parallel",
    )
    sync, trainers = config.weight_sync, dict[str, int]()
    bucket = BYTES[config.model.dtype] * shape.vocab_size * shape.hidden_size
    if isinstance(sync, BroadcastSync):
        bucket = max(bucket, sync.bucket_bytes_on(config.trainer.device))
    if sync.gathers_in_activate:
        # Elsewhere they have left by then.
        trainers = {"trainer's weights": rank.parts["weights"] + rank.parts.get("adapters", 0)}
    yield TurnMemory(
        name="while weights are sent",
        parts={
            **trainers,
            "engine's weights": engine["weights"],
            "what is on its way": bucket,
            "libraries": of_trainer + of_engine,
        },
        advice="more of trainer.parallel.tensor, trainer.parallel.pipeline or engines.tensor_parallel",
    )
    yield TurnMemory(
        name="the engines' turn",
        parts={
            "weights": engine["weights"],
            "kv cache": engine.get("kv cache", kv_pool(config, engine["weights"], gpu=gpu)),
            "engine's work": engine_working_bytes(config, gpu=gpu),
            "engine's libraries": of_engine,
            "trainer's libraries": of_trainer,
        },
        advice="a smaller sglang.mem_fraction_static or sglang.chunked_prefill_size",
    )


def kv_pool(config: RunConfig, weights: int, *, gpu: int) -> int:
    """What SGLang's `mem_fraction_static`, of weights and KV together, leaves for KV."""
    fraction = float(config.sglang.get("mem_fraction_static") or SHARED_MEM_FRACTION)
    return max(0, round(fraction * gpu) - weights)


def engine_working_bytes(config: RunConfig, *, gpu: int) -> int:
    """What SGLang itself would leave for activations and graphs (0.5.23, `srt/arg_groups/memory_hook.py`).

    512 MiB, 1.5 MiB for each token of a chunk of a prompt, 1 GiB for every eight ranks of an engine; at least 10 GiB on
    a GPU of more than 60.
    """
    chunk = config.sglang.get("chunked_prefill_size")
    if not isinstance(chunk, int) or chunk <= 0:
        chunk = next(
            (size for most, size in ((20, 2048), (60, 4096), (160, 8192)) if gpu < most << 30), 16384
        )
    found = round((512 + 1.5 * max(chunk, 2048) + 128 * config.engines.tensor_parallel) * MIB)
    return max(found, 10 << 30) if gpu > 60 << 30 else found
