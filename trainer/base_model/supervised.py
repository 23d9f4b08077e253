"""Supervised training with the same Megatron trainer: cross-entropy over a stream of token sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.objective import SupervisedLoss
from polyturn.configs.schema.run import ModelConfig, RunConfig
from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.optimizer import LearningRateSchedule
from polyturn.trainer.megatron.policy import MegatronPolicy

Example = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and which of them the model is taught to predict. The first token cannot be predicted."""
Progress = Callable[[int, dict[str, float]], None]
"""Called after each update with the number of updates so far and its metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedConfig:
    """How to run over the stream."""

    num_updates: int
    tokens_per_update: int = 8192
    """An update takes examples until it has this many tokens, taught or not."""
    learning_rate: float = 1e-3
    warmup_updates: int = 50
    cosine: bool = True
    """Half a cosine down to `final_fraction` of the rate over `num_updates`; False keeps it."""
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    clip_grad: float = 1.0
    max_tokens_per_gpu: int = 4096
    """On a CPU packs of 2 to 4 thousand tokens are fastest: their activations stay in the cache."""

    def schedule(self) -> LearningRateSchedule:
        return LearningRateSchedule(
            peak=self.learning_rate,
            warmup_updates=self.warmup_updates,
            kind="cosine" if self.cosine else "constant",
            num_updates=self.num_updates,
            final_fraction=self.final_fraction,
        )

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            beta1=self.beta1,
            beta2=self.beta2,
            clip_grad=self.clip_grad,
        )


def one_rank(
    model_path: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    **trainer: Any,
) -> RunConfig:
    """The config of a policy that is trained outside of a run, in this process alone.

    Args:
        trainer: fields of the section `trainer` that differ from the quickstart's.
    """
    recipe = load_config("quickstart")
    section = recipe.trainer.model_copy(update={"parallel": ParallelConfig(), **trainer})
    model = ModelConfig(path=str(model_path), dtype=dtype)
    return recipe.model_copy(update={"model": model, "trainer": section, "seed": seed})


def train_supervised(
    model_path: Path,
    examples: Iterable[Example],
    output: Path,
    config: SupervisedConfig,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train the model of a Hugging Face directory in this process, write it to `output`, return the losses by update.

    Raises:
        ValueError: the stream ended before the last update.
    """
    run = one_rank(
        model_path,
        dtype=dtype,
        seed=seed,
        device=device,
        optimizer=config.optimizer(),
        max_tokens_per_gpu=config.max_tokens_per_gpu,
    )
    policy = MegatronPolicy(run)
    try:
        losses = train_on_stream(policy, examples, config, progress=progress)
        policy.save_hf(output)
    finally:
        policy.close()
    return losses


def train_on_stream(
    policy: MegatronPolicy,
    examples: Iterable[Example],
    config: SupervisedConfig,
    *,
    progress: Progress | None = None,
) -> list[float]:
    """`config.num_updates` updates of a single-rank policy; returns the mean cross-entropy per taught token of each.

    Raises:
        ValueError: the stream ended before the last update.
    """
    assert policy.parallel.world_size == 1, "supervised training runs on one rank"
    schedule = config.schedule()
    batches = _batches(iter(examples), config.tokens_per_update)
    losses: list[float] = []
    for update in range(config.num_updates):
        samples = next(batches, None)
        if samples is None:
            raise ValueError(f"the examples ended after {update} of {config.num_updates} updates")
        metrics = policy.train(
            samples,
            objective=Objective(loss=SupervisedLoss(kind="supervised")),
            global_counts=GlobalCounts.of(sample.num_trainable for sample in samples),
            learning_rate=schedule(update),
        )
        losses.append(metrics["loss"])
        if progress is not None:
            progress(update + 1, metrics)
    return losses


def _batches(examples: Iterator[Example], tokens_per_update: int) -> Iterator[list[TrainSample]]:
    """Examples in lots of at least `tokens_per_update` tokens; what is left at the end of the stream is not enough."""
    samples: list[TrainSample] = []
    num_tokens = 0
    for number, (token_ids, mask) in enumerate(examples):
        sample = _make_sample(f"example {number}", token_ids, mask)
        samples.append(sample)
        num_tokens += len(sample)
        if num_tokens >= tokens_per_update:
            yield samples
            samples, num_tokens = [], 0


def _make_sample(name: str, token_ids: Sequence[int], mask: Sequence[bool]) -> TrainSample:
    if len(token_ids) != len(mask) or len(token_ids) < 2:
        raise ValueError(
            f"{name}: {len(token_ids)} tokens with a mask of {len(mask)}; both must be 2 or more alike"
        )
    taught = np.array(mask, dtype=np.bool_)
    taught[0] = False
    return TrainSample(
        sample_id=name,
        group_id=name,
        sequence_id=name,
        token_ids=np.array(token_ids, dtype=np.int64),
        sampled=taught,
        behavior_logprobs=np.zeros(len(taught), dtype=np.float32),
        policy_versions=np.zeros(len(taught), dtype=np.int32),
        turns=np.zeros(len(taught), dtype=np.int32),
    )
