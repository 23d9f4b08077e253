"""Models with random weights and samples to train them on, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.parts import Device
from polyturn.configs.models import preset_directory, read_json
from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.base_model.supervised import one_rank
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.packing import make_micro_batches
from polyturn.trainer.megatron.process_groups import Place, join_ranks, leave_ranks

INITIAL_STD = 0.02


def sized(device: Device, **cpu: Any) -> dict[str, Any]:
    """Qwen3's config: in the sizes of the 4B model with 4 layers on a GPU, in these on a CPU."""
    config = dict(read_json(preset_directory("qwen3-4b") / "config.json"))
    tiny = {
        "vocab_size": 304,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return config | (
        {"num_hidden_layers": 4} if device == "cuda" else {"num_hidden_layers": 2, **tiny, **cpu}
    )


@contextmanager
def engine_of(
    hf_config: Mapping[str, Any],
    *,
    device: Device,
    dtype: Any,
    max_tokens: int,
    seed: int = 0,
    **optimizer: Any,
) -> Iterator[Engine]:
    """One rank with a model of this config, its weights drawn on the device, and its optimizer."""
    config = one_rank(
        Path("random"),
        dtype=dtype,
        device=device,
        optimizer=OptimizerConfig(**optimizer),
        max_tokens_per_gpu=max_tokens,
    )
    join_ranks(ParallelConfig(), Place(), device=device, seed=seed)
    engine = None
    try:
        engine = Engine(
            hf_config,
            config,
            optimizer=config.trainer.optimizer,
            pack=partial(make_micro_batches, max_tokens=max_tokens, parallel=ParallelConfig()),
            prepare=lambda _chunk: None,
        )
        fill(engine, seed=seed)
        engine.build_optimizer()
        yield engine
    finally:
        if engine is not None:
            engine.release()
        leave_ranks()


@torch.no_grad()
def fill(engine: Engine, *, seed: int) -> None:
    """Weights as a model has them before pre-training: norms are 1, everything else normal."""
    generator = torch.Generator(engine.device).manual_seed(seed)
    for chunk in engine.chunks:
        for param in chunk.parameters():
            if param.dim() > 1:
                param.normal_(0.0, INITIAL_STD, generator=generator)
            else:
                param.fill_(1.0)


def make_samples(vocab_size: int, lengths: Sequence[int]) -> list[TrainSample]:
    """Episodes of these lengths whose second half was sampled."""
    rng = np.random.default_rng(0)
    samples = []
    for index, length in enumerate(lengths):
        sampled = np.arange(length) >= length // 2
        samples.append(
            TrainSample(
                sample_id=f"s{index}",
                group_id=f"g{index // 4}",
                sequence_id=f"s{index}",
                token_ids=rng.integers(3, vocab_size, length).astype(np.int32),
                sampled=sampled,
                behavior_logprobs=np.where(sampled, -8, 0).astype(np.float32),
                proximal_logprobs=np.where(sampled, -8, 0).astype(np.float32),
                policy_versions=np.zeros(length, dtype=np.int32),
                turns=np.zeros(length, dtype=np.int16),
                advantages=np.full(length, rng.normal(), dtype=np.float32),
            )
        )
    return samples


def logprobs(engine: Engine, samples: Sequence[TrainSample]) -> np.ndarray:
    """Of the sampled tokens, one sample behind the other."""
    columns = engine.score(samples, temperature=1.0, what="logprob")
    return np.concatenate([column[sample.sampled] for column, sample in zip(columns, samples, strict=True)])


def update(engine: Engine, samples: Sequence[TrainSample], *, learning_rate: float) -> dict[str, float]:
    """One optimizer step."""
    return engine.update(
        samples, objective=Objective(), counts=count_samples(samples), learning_rate=learning_rate
    )
